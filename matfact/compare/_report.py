"""Terminal table of a comparison."""

from __future__ import annotations

from collections.abc import Iterable

import rich.box
from rich.table import Table

from matfact.compare._rows import budget
from matfact.compare._table import Comparison, SummaryRow

_HEADINGS = {
    "normalized_error": "normalized\nerror",
    "relative_error": "relative\nerror",
    "density": "density\nused",
    "bits_per_weight": "bits",
    "seconds": "seconds",
    "flops_ratio": "FLOPs\nratio",
}
#: The measures whose spread tells something of a method; budgets hardly vary.
_SPREAD = {"normalized_error", "relative_error"}


def summary_table(comparison: Comparison) -> Table:
    """Return a table of mean ± spread of every method, with one section per size.

    Parameters
    ----------
    comparison : Comparison
        The fits.

    Returns
    -------
    rich.table.Table
        Print it with ``rich.print``.
    """
    summary = comparison.summary()
    asked = [budget(group.requested_bits, group.requested_density) for group in summary]
    several = len(set(asked)) > 1
    # With equal bytes the number of values, by which errors are normalized, is each method's own.
    by_bits = any(group.requested_bits is not None for group in summary)
    headings = {n: h for n, h in _HEADINGS.items() if not (by_bits and n == "normalized_error")}
    table = Table(
        box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False,  # fits 80 columns
        caption="mean ± standard deviation; normalized: ÷ error of magnitude pruning; "
        "bits: of a file ÷ weights",
    )  # fmt: skip
    for heading in (*(["asked"] if several else []), "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    section: list[str] = []
    for goal, group in zip(asked, summary, strict=True):
        head = [goal, group.size] if several else [group.size]
        if section not in ([], head):
            table.add_section()
        table.add_row(
            *([""] * len(head) if head == section else head), group.method, *_cells(group, headings)
        )
        section = head
    return table


def _cells(group: SummaryRow, measures: Iterable[str]) -> list[str]:
    """Return the measures of one row."""
    if not group.mean:
        return ["[red]failed[/]"]
    cells = []
    for name in measures:
        spread = f" ± {group.std[name]:.3f}" if name in _SPREAD and group.n_ok > 1 else ""
        digits = 2 if name == "bits_per_weight" else 3
        cells.append(f"{group.mean[name]:.{digits}f}{spread}")
    return [*cells, f"[red]{group.n_failed} failed[/]"] if group.n_failed else cells
