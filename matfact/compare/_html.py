"""HTML page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matfact import _html
from matfact.compare._plot import plot_comparison
from matfact.compare._rows import ComparisonRow, SummaryRow, budget
from matfact.factorizers._registry import label

#: Heading and name of the measures in the tables; the first two also have bars.
_MEASURES = (
    ("normalized error", "normalized_error"),
    ("relative error", "relative_error"),
    ("density", "density"),
    ("bits a weight", "bits_per_weight"),
    ("FLOPs ÷ dense", "flops_ratio"),
    ("seconds", "seconds"),
)
_DRAWN = ("normalized_error", "relative_error")


def page(
    rows: Sequence[ComparisonRow], summary: Sequence[SummaryRow], metadata: Mapping[str, Any]
) -> str:
    """Return a page with the figure, the means and every fit, without scripts.

    Without a working matplotlib the page has no figure.
    """
    try:
        figure = _html.picture(plot_comparison(rows), "Normalized error by size and method")
    except ImportError:
        figure = ""
    failed = sum(row.status != "ok" for row in rows)
    lead = f"{len(rows)} fits, {failed} failed."
    means = _html.table(
        ["method", "size", "asked", "fits", *(f"mean {h}" for h, _ in _MEASURES)],
        _rows_of_means(summary),
    )
    fits = _html.table(
        ["matrix", "method", "size", "asked", *(h for h, _ in _MEASURES), "notes"],
        map(_cells, rows),
    )
    return _html.page(
        "Comparison of factorizations", lead, metadata, figure,
        "<h2>Means</h2>", means, "<h2>Every fit</h2>", fits,
    )  # fmt: skip


def _rows_of_means(summary: Sequence[SummaryRow]) -> list[list[str]]:
    drawn = {name: [group.mean.get(name, 0.0) for group in summary] for name in _DRAWN}
    largest = {n: max(filter(math.isfinite, means), default=0.0) for n, means in drawn.items()}
    return [
        [
            _html.escape(label(group.method)),
            _html.escape(group.size),
            budget(group.requested_bits, group.requested_density),
            str(group.n_ok),
            *(_html.measured(group.mean.get(n), largest.get(n, 0.0)) for _, n in _MEASURES),
        ]
        for group in summary
    ]


def _cells(row: ComparisonRow) -> list[str]:
    return [
        _html.escape(row.matrix),
        _html.escape(row.method),
        _html.escape(row.size),
        row.budget,
        *(_html.measured(getattr(row, name)) for _, name in _MEASURES),
        _html.escape(row.message),
    ]
