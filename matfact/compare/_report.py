"""Terminal table of a comparison."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from matfact._tables import FittedTable, Heading
from matfact.compare._rows import budget
from matfact.compare._table import Comparison, SummaryRow

_HEADINGS = {
    "normalized_error": Heading("normalized\nerror", 1),
    "relative_error": Heading("relative\nerror"),
    "density": Heading("density\nused", 4),
    "bits_per_weight": Heading("bits", 2),
    "seconds": Heading("seconds", 5),
    "flops_ratio": Heading("FLOPs\nratio", 3),
}
#: The measures whose spread tells something of a method; budgets hardly vary.
_SPREAD = {"normalized_error", "relative_error"}


def summary_table(comparison: Comparison) -> FittedTable:
    """Return a table of mean ± spread of every method, with one section per size.

    Parameters
    ----------
    comparison : Comparison
        The fits.

    Returns
    -------
    rich.table.Table
        Print it with ``rich.print``. A narrow terminal gets fewer columns.
    """
    summary = comparison.summary()
    asked = [budget(group.requested_bits, group.requested_density) for group in summary]
    several = len(set(asked)) > 1
    # With equal bytes the number of values, by which errors are normalized, is each method's own.
    by_bits = any(group.requested_bits is not None for group in summary)
    headings = {n: h for n, h in _HEADINGS.items() if not (by_bits and n == "normalized_error")}
    first = [*([Heading("asked")] if several else []), Heading("size")]
    sections: dict[tuple[str, ...], list[list[str | Text]]] = {}
    for goal, group in zip(asked, summary, strict=True):
        head = (goal, group.size) if several else (group.size,)
        rows = sections.setdefault(head, [])
        shown = [""] * len(head) if rows else head
        rows.append([*shown, group.method, *_cells(group, headings)])
    return FittedTable(
        [*first, Heading("method", is_number=False), *headings.values()], list(sections.values()),
        "mean ± standard deviation; normalized: ÷ error of magnitude pruning; "
        "bits: of a file ÷ weights",
    )  # fmt: skip


def _cells(group: SummaryRow, measures: Iterable[str]) -> list[str | Text]:
    """Return the measures of one row."""
    measures = list(measures)
    if not group.mean:
        return [Text("failed", "red"), *[""] * (len(measures) - 1)]
    cells: list[str | Text] = []
    for name in measures:
        spread = f" ± {group.std[name]:.3f}" if name in _SPREAD and group.n_ok > 1 else ""
        digits = 2 if name == "bits_per_weight" else 3
        cells.append(f"{group.mean[name]:.{digits}f}{spread}")
    return [*cells, f"[red]{group.n_failed} failed[/]"] if group.n_failed else cells
