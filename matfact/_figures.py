"""The style of Matplotlib figures; matplotlib is optional."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of Okabe and Ito, each colour with its own marker.
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#4D4D4D",
    "#8C6D1F",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
GREY = "#808080"  # lines to compare with, readable on light and dark pages
GRID = "#E0E0E0"
_LINE = 0.06  # height of a direct label ÷ that of its panel


def style() -> dict[str, Any]:
    """Return the style as Matplotlib settings, for scripts with `matplotlib.rc_context`."""
    from cycler import cycler

    return {
        "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "lines.markersize": 5,
        # The same data give the same file.
        "svg.hashsalt": "matfact",
    }


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


def marked(i: int) -> dict[str, str]:
    """Return the colour and marker of the `i`-th of what is compared; 64 pairs are distinct."""
    turns, place = divmod(i, len(COLORS))
    return {"color": COLORS[place], "marker": MARKERS[(place + turns) % len(MARKERS)]}


def plain(axes: Axes, grid: str = "both") -> None:
    """Draw a light grid behind the data, and no frame."""
    axes.grid(axis=grid, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_directly(axes: Axes, entries: Iterable[tuple[float, str, dict[str, str]]]) -> None:
    """Write names to the right of the axes, each at its height or as near as there is room.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        With its final limits.
    entries : iterable of (float, str, dict)
        Value on the vertical axis, name, and colour and marker as of `marked`.
    """
    axes.autoscale_view()  # what is drawn may still have to set the limits
    ordered = sorted(entries, key=lambda entry: entry[0])
    to_panel = (axes.transScale + axes.transLimits).transform
    wanted = np.array([to_panel((1.0, value))[1] for value, _, _ in ordered])
    step = min(_LINE, 1.0 / max(1, len(ordered)))
    offsets = step * np.arange(len(ordered))
    # Least squares with gaps of at least `step`: a bounded isotonic regression of what is wanted.
    heights = np.clip(_isotonic(wanted - offsets), 0.0, 1.0 - offsets.max(initial=0.0)) + offsets
    for height, (_, name, look) in zip(heights, ordered, strict=True):
        axes.scatter(
            [1.03], [height], s=40, color=look["color"], marker=look["marker"],
            transform=axes.transAxes, clip_on=False,
        )  # fmt: skip
        axes.text(1.055, height, name, transform=axes.transAxes, va="center", fontsize="medium")


def label_lines(axes: Axes) -> None:
    """Name the labelled lines of a panel at their right ends."""
    entries = []
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
        line: Any = handle[0] if isinstance(handle, tuple) else handle  # one with error bars
        points = np.array([line.get_xdata(), line.get_ydata()], float).T
        points = points[np.isfinite(points).all(1)]
        if len(points):
            marker = line.get_marker()
            look = {"color": line.get_color(), "marker": "_" if marker in ("None", "") else marker}
            entries.append((float(points[points[:, 0].argmax(), 1]), name, look))
    label_directly(axes, entries)


def _isotonic(values: np.ndarray) -> np.ndarray:
    """Return the nearest non-decreasing sequence, by pooling neighbours that violate the order."""
    pools: list[list[float]] = []  # mean and length
    for value in values:
        pools.append([float(value), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, length = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * length) / (before[1] + length)
            before[1] += length
    return np.repeat([mean for mean, _ in pools], [int(length) for _, length in pools])
