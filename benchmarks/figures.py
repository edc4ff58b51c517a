"""Figures of the benchmarks, in the style of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from matfact._figures import label_lines, style

__all__ = ["label_lines", "save"]


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Write the figure that `draw` returns as SVG, for light and dark pages."""
    with mpl.rc_context(style()):
        draw().savefig(path, format="svg", transparent=True, metadata={"Date": None})
