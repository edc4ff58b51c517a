"""A comparison as a table for the terminal."""

from __future__ import annotations

import rich.box
from rich.table import Table

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
    """Return mean ± spread of every method at every size, one section a size.

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
        caption="mean ± standard deviation; normalized: ÷ error of magnitude pruning; "
        "bits: of a file ÷ weights",
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
        digits = 2 if name == "bits_per_weight" else 3
        cells.append(f"{group.mean[name]:.{digits}f}{spread}")
    return [*cells, f"[red]{group.n_failed} failed[/]"] if group.n_failed else cells
