"""Terminal table of a comparison."""

from __future__ import annotations

import rich.box
from rich.table import Table

from matfact.compare._table import Comparison, SummaryRow

_HEADINGS = {
    "normalized_error": "normalized\nerror",
    "relative_error": "relative\nerror",
    "density": "density\nused",
    "seconds": "seconds",
    "flops_ratio": "FLOPs\nratio",
}
#: Measures shown with their spread; those of budgets hardly vary.
_SPREAD = {"normalized_error", "relative_error", "seconds"}


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
    several = len({group.requested_density for group in summary}) > 1
    table = Table(
        box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False,  # fits 80 columns
        caption="mean ± standard deviation; normalized: ÷ error of magnitude pruning",
    )  # fmt: skip
    for heading in (*(["asked"] if several else []), "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    section: list[str] = []
    for group in summary:
        asked = "" if group.requested_density is None else f"{group.requested_density:g}"
        head = [asked, group.size] if several else [group.size]
        if section not in ([], head):
            table.add_section()
        table.add_row(
            *([""] * len(head) if head == section else head), group.method, *_cells(group)
        )
        section = head
    return table


def _cells(group: SummaryRow) -> list[str]:
    """Return the measures of one row."""
    if not group.mean:
        return ["[red]failed[/]"]
    cells = []
    for name in _HEADINGS:
        spread = f" ± {group.std[name]:.3f}" if name in _SPREAD and group.n_ok > 1 else ""
        cells.append(f"{group.mean[name]:.3f}{spread}")
    return [*cells, f"[red]{group.n_failed} failed[/]"] if group.n_failed else cells
