"""Matplotlib figures; matplotlib is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """Return an empty figure of the given size in inches, or say what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        from matfact._text import extra

        raise ImportError(f"The figure needs matplotlib: {extra('plots')}.") from error
    except OSError as error:  # matplotlib needs a writable folder, at least a temporary one
        raise ImportError(f"The figure needs matplotlib, but: {error}") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)
