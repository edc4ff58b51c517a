"""Plots of errors against matrix sizes, like Boža & Macko 2025, Fig. 3."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matfact._figures import GREY, label_directly, label_lines, marked, new_figure, plain
from matfact._files import write_atomically
from matfact.compare._rows import ComparisonRow
from matfact.factorizers._registry import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from matfact.factorizers import BaseFactorizer

_GROUP_WIDTH = 0.72  # of the distance between two sizes
_BASELINE = "magnitude"  # its normalized error is 1 by definition


def plot_comparison(comparison: Sequence[ComparisonRow]) -> Figure:
    """Draw the normalized error of each method against the size of the matrices.

    Small dots are single fits, large dots their mean. The line at 1 is magnitude pruning, which has
    no dots. There is one panel per density. A comparison at the same bits a weight is drawn as mean
    relative error against bits, and against the FLOPs of the product, with a line for each method.

    Parameters
    ----------
    comparison : Comparison or sequence of ComparisonRow
        Failed fits and infinite normalized errors are omitted.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with its ``savefig``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    if any(row.requested_bits is not None for row in comparison):
        return _plot_bits(comparison)
    densities = sorted({row.requested_density for row in comparison}, key=lambda d: d or 0.0)
    by_size = sorted(comparison, key=lambda row: (row.rows * row.columns, row.size))
    sizes = list(dict.fromkeys(row.size for row in by_size))
    methods = [m for m in dict.fromkeys(row.method for row in comparison) if m != _BASELINE]
    width = max(4.5, 1.3 * len(sizes) + 1.0)
    figure = new_figure(width * len(densities) + 2.2, 4.4, dpi=200)
    panels = figure.subplots(1, max(1, len(densities)), sharey=True, squeeze=False)[0]
    for density, axes in zip(densities, panels, strict=False):
        rows = [row for row in comparison if row.requested_density == density]
        _draw_panel(axes, rows, sizes, methods)
        axes.set_title("" if density is None else f"density {density:g}", fontsize=11)
    # Last, since the shared range would not adapt to later plots.
    panels[0].set_ylim(bottom=0.0)
    panels[0].set_ylabel("error ÷ error of magnitude pruning")
    label_directly(panels[-1], _last_means(comparison, methods))
    return figure


def _last_means(
    rows: Sequence[ComparisonRow], methods: Sequence[str]
) -> list[tuple[float, str, dict[str, str]]]:
    """Return what labels each method: its mean at the largest size of the highest density."""
    entries = [(1.0, label(_BASELINE), {"color": GREY, "marker": "_"})]
    order = sorted(rows, key=lambda r: (r.requested_density or 0.0, r.rows * r.columns))
    for i, method in enumerate(methods):
        last = [row for row in order if row.method == method and _is_drawn(row)]
        if last:
            key = (last[-1].requested_density, last[-1].size)
            group = [r for r in last if (r.requested_density, r.size) == key]
            mean = float(np.mean([row.normalized_error for row in group]))
            entries.append((mean, label(method), marked(i)))
    return entries


def _is_drawn(row: ComparisonRow) -> bool:
    return row.normalized_error is not None and math.isfinite(row.normalized_error)


def _plot_bits(comparison: Sequence[ComparisonRow]) -> Figure:
    """Draw mean errors against bits and against FLOPs, one row of panels for each size."""
    ok = [row for row in comparison if row.relative_error is not None]
    sizes = list(dict.fromkeys(row.size for row in sorted(ok, key=lambda r: r.rows * r.columns)))
    methods = list(dict.fromkeys(row.method for row in comparison))
    figure = new_figure(9.6, 3.8 * max(1, len(sizes)), dpi=200)
    panels = figure.subplots(max(1, len(sizes)), 2, sharey="row", squeeze=False)
    for size, (left, right) in zip(sizes, panels, strict=False):
        for i, method in enumerate(methods):
            rows = [row for row in ok if (row.size, row.method) == (size, method)]
            goals = sorted({row.requested_bits or 0.0 for row in rows})
            points = [_mean_point(rows, bits) for bits in goals]
            style: dict[str, Any] = {**marked(i), "label": label(method)}
            for axes, place in ((left, 0), (right, 1)):
                axes.plot([p[place] for p in points], [p[2] for p in points], **style)
        left.set_ylabel(f"relative error, {size}")
        left.set_ylim(bottom=0.0)
    for axes, name in zip(panels[-1], ("bits a weight", "FLOPs ÷ dense"), strict=True):
        axes.set_xlabel(name)
    for axes in panels.ravel():
        plain(axes)
    for axes in panels[:, 1]:
        label_lines(axes)
    return figure


def _mean_point(rows: Sequence[ComparisonRow], bits: float | None) -> tuple[float, ...]:
    """Return mean bits, FLOPs and error of the fits with a budget."""
    group = [row for row in rows if row.requested_bits == bits]
    columns = ("bits_per_weight", "flops_ratio", "relative_error")
    return tuple(float(np.mean([getattr(row, name) for row in group])) for name in columns)


def plot_history(fits: Mapping[str, BaseFactorizer]) -> Figure:
    """Draw the objective of fitted estimators against the seconds it took to reach it.

    Parameters
    ----------
    fits : mapping of str to BaseFactorizer
        Fitted estimators, by their names in the figure. Objectives differ between solvers, so only
        compare fits of one class to one matrix.

    Returns
    -------
    matplotlib.figure.Figure
        Save it with its ``savefig``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    figure = new_figure(6.4, 4.0, dpi=200)
    axes = figure.subplots()
    for i, (name, estimator) in enumerate(fits.items()):
        history, look = estimator.history_, marked(i)
        axes.plot(
            history["seconds"], history["objective"], color=look["color"], marker=look["marker"],
            markersize=4, label=name,
        )  # fmt: skip
    axes.set_yscale(**_scale([line.get_ydata() for line in axes.get_lines()]))
    axes.set_xlabel("seconds")
    axes.set_ylabel("objective")
    plain(axes)
    label_lines(axes)
    return figure


def _scale(drawn: Sequence[Any]) -> dict[str, Any]:
    """Return a scale that can show all numbers; a logarithmic one cannot show 0."""
    numbers = np.concatenate([np.ones(1), *map(np.asarray, drawn)])
    if (numbers > 0).all():
        return {"value": "log"}
    return {"value": "symlog", "linthresh": float(numbers[numbers > 0].min())}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` to a PNG file, or an SVG file if `path` ends in ``.svg``, atomically."""
    buffer = io.BytesIO()
    if Path(path).suffix == ".svg":
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _draw_panel(
    axes: Axes, rows: Sequence[ComparisonRow], sizes: Sequence[str], methods: Sequence[str]
) -> None:
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, label=label(_BASELINE))
    step = _GROUP_WIDTH / max(1, len(methods))
    for i, method in enumerate(methods):
        look = marked(i)
        offset = (i - (len(methods) - 1) / 2) * step
        groups = {
            place + offset: errors
            for place, size in enumerate(sizes)
            if (errors := _errors(rows, method, size))
        }
        dots = [(place, error) for place, errors in groups.items() for error in errors]
        axes.plot(
            *np.reshape(dots, (-1, 2)).T, ".", color=look["color"], markersize=6,
            markeredgecolor="white", markeredgewidth=0.5, zorder=3,  # in front of the mean
        )  # fmt: skip
        axes.plot(
            list(groups), [float(np.mean(errors)) for errors in groups.values()],
            look["marker"], color=look["color"], alpha=0.6, markersize=11, markeredgewidth=0,
            label=label(method),
        )  # fmt: skip
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_xlabel("matrix size")
    plain(axes, "y")


def _errors(rows: Sequence[ComparisonRow], method: str, size: str) -> list[float]:
    """Return the finite normalized errors of a method at a size."""
    chosen = (row for row in rows if (row.method, row.size) == (method, size) and _is_drawn(row))
    return [float(row.normalized_error or 0.0) for row in chosen]
