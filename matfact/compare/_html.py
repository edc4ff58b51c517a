"""HTML page of a comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matfact import _html
from matfact._html import Column, Total
from matfact.compare._plot import plot_comparison
from matfact.compare._rows import ComparisonRow, SummaryRow, budget
from matfact.factorizers._registry import label

#: Measures in the tables by name; the first two also have bars.
_MEASURES = {
    "normalized_error": Column(
        "÷ magnitude",
        "Relative error ÷ that of magnitude pruning with as many values. Below 1 is better.",
    ),
    "relative_error": Column("relative error", "‖W − Ŵ‖ ÷ ‖W‖: what the matrix has lost."),
    "density": Column("density", "Stored values ÷ entries of the matrix."),
    "bits_per_weight": Column("bits a weight", "Bits of the file of the factors ÷ entries."),
    "flops_ratio": Column("FLOPs ÷ dense", "Operations of the product ÷ those of the matrix."),
    "seconds": Column("seconds", "Time of a fit on one thread."),
}
_DRAWN = ("normalized_error", "relative_error")
#: Measures of which less is better; density and bits are what was asked for.
_BETTER_LESS = {"normalized_error", "relative_error", "flops_ratio", "seconds"}
_METHOD = Column("method", "Name of the method.", "t")
_MEANS = (
    _METHOD,
    Column("fits", "Fits that succeeded, and of how many where some failed."),
    *_MEASURES.values(),
)
_FITS = (
    Column("matrix", "Name of the matrix.", "t"),
    _METHOD,
    Column("size", "One number for a square matrix, else rows × columns."),
    Column("asked", "Requested density or bits a weight."),
    *_MEASURES.values(),
    Column("notes", "Why the fit failed, or what it warned about.", "t note"),
)


def page(
    rows: Sequence[ComparisonRow], summary: Sequence[SummaryRow], metadata: Mapping[str, Any]
) -> str:
    """Return a page with totals, the figure, the means by size and every fit, without scripts.

    Without a working matplotlib the page has no figure.
    """
    try:
        figure = _html.picture(plot_comparison(rows), "Normalized error by size and method")
    except ImportError:
        figure = ""
    failed = sum(row.status != "ok" for row in rows)
    lead = f"{len(rows)} fits, {failed} failed. The best of each group is bold."
    groups = _groups(summary)
    means = (
        f"<h3>{_html.escape(name)}</h3>{_html.table(_MEANS, _rows_of_means(group), name)}"
        for name, group in groups.items()
    )
    return _html.page(
        "Comparison of factorizations", lead, _html.totals(_totals(rows, groups.values())),
        figure, "<h2>Means</h2>", *means, _html.meanings(_MEANS),
        "<h2>Every fit</h2>", _html.table(_FITS, map(_cells, rows), "Every fit"),
        _html.settings(metadata),
    )  # fmt: skip


def _groups(summary: Sequence[SummaryRow]) -> dict[str, list[SummaryRow]]:
    """Return the means by size, and then by what was asked for."""
    groups: dict[str, list[SummaryRow]] = {}
    sizes = list(dict.fromkeys(row.size for row in summary))
    for row in sorted(summary, key=lambda row: sizes.index(row.size)):
        asked = budget(row.requested_bits, row.requested_density)
        what = asked if row.requested_bits is not None or not asked else f"density {asked}"
        groups.setdefault(", ".join(filter(None, (f"size {row.size}", what))), []).append(row)
    return groups


def _totals(rows: Sequence[ComparisonRow], groups: Iterable[Sequence[SummaryRow]]) -> list[Total]:
    ends = [_best(group) for group in groups]
    first = Counter(
        row.method
        for group, best in zip(groups, ends, strict=True)
        for row in group
        if row.mean and row.mean["relative_error"] == best.get("relative_error")
    )
    failed = sum(row.status != "ok" for row in rows)
    found = [
        Total(
            Column("fits", "Of a method to a matrix."), str(len(rows)),
            f"{failed} failed" if failed else "none failed",
        ),
        Total(Column("methods", "Compared."), str(len({row.method for row in rows}))),
        Total(Column("matrices", "Compared."), str(len({row.matrix for row in rows}))),
        Total(
            Column("fitting", "Time of all fits, each on one thread."),
            f"{math.fsum(row.seconds or 0.0 for row in rows):.1f} s",
        ),
    ]  # fmt: skip
    for method, count in first.most_common(1):
        most = Column("lowest error", "The method with the least mean relative error most often.")
        found.insert(0, Total(most, label(method), f"in {count} of {len(ends)} groups"))
    return found


def _best(group: Iterable[SummaryRow]) -> dict[str, float]:
    """Return the least mean of each measure."""
    group = list(group)
    # With equal bytes the number of values, by which errors are normalized, is each method's own.
    by_bits = any(row.requested_bits is not None for row in group)
    names = _BETTER_LESS - ({"normalized_error"} if by_bits else set())
    values = {name: [row.mean[name] for row in group if name in row.mean] for name in names}
    finite = {name: list(filter(math.isfinite, held)) for name, held in values.items()}
    return {name: min(held) for name, held in finite.items() if len(held) == 1 or len({*held}) > 1}


def _rows_of_means(group: Sequence[SummaryRow]) -> list[list[str]]:
    drawn = {name: [row.mean.get(name, 0.0) for row in group] for name in _DRAWN}
    largest = {n: max(filter(math.isfinite, means), default=0.0) for n, means in drawn.items()}
    best = _best(group) if len(group) > 1 else {}

    def cell(row: SummaryRow, name: str) -> str:
        value = row.mean.get(name)
        shown = _html.measured(value, largest.get(name, 0.0))
        return f"<b>{shown}</b>" if value is not None and value == best.get(name) else shown

    return [
        [
            _html.escape(label(row.method)),
            f"{row.n_ok} of {row.n_ok + row.n_failed}" if row.n_failed else str(row.n_ok),
            *(cell(row, name) for name in _MEASURES),
        ]
        for row in group
    ]


def _cells(row: ComparisonRow) -> list[str]:
    return [
        _html.escape(row.matrix),
        _html.escape(row.method),
        _html.escape(row.size),
        row.budget,
        *(_html.measured(getattr(row, name)) for name in _MEASURES),
        _html.escape(row.message),
    ]
