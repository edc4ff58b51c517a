"""Networks of the same bytes: one density for all layers, or densities chosen by a budget.

The budget has the bytes that the one density takes, and spreads them by the relative errors of
layers ("errors"), or by these times the harm they do to the output ("harm"). Networks, texts and
measures are those of ``calibration``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure

from benchmarks import study
from benchmarks.harness import Row
from benchmarks.networks import fresh
from benchmarks.networks.subjects import KINDS, subject
from benchmarks.tables import markdown_table
from matfact import DoubleSparseFactorizer
from matfact.torch import Budget, compress, output_harm

SEEDS = 1
#: Networks with calibration samples, samples per batch, and sweeps.
NETWORKS = {
    "ResNet-20": (256, 16, 50), "mobile network": (256, 16, 50), "sentence encoder": (128, 16, 25),
}  # fmt: skip
DENSITIES = (0.1, 0.25)
FORMS = ("uniform", "errors", "harm")
#: Densities that are tried, as multiples of the one density.
TRIED = (0.5, 0.75, 1.0, 1.5, 2.5)


def run(quick: bool, folder: Path, cells: str = "") -> int:
    """Run the unfinished cells, and write the table."""
    return study.execute(STUDY, "allocation", folder, quick=quick, pattern=cells)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield networks with densities."""
    for name, (samples, size, sweeps) in NETWORKS.items():
        options = KINDS[name].quick if quick else KINDS[name].full
        if options is not None:
            effort = {"samples": 16, "size": 4, "sweeps": 5} if quick else {
                "samples": samples, "size": size, "sweeps": sweeps}  # fmt: skip
            for density in (0.25,) if quick else DENSITIES:
                yield {"network": name, "form": "quick" if quick else "full",
                       "recipe": str(options), "density": density, **effort}  # fmt: skip


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compress a network in all forms, and return their measures on fresh inputs."""
    dense = subject(cell["network"], cell["form"] == "quick")
    batches = dense.calibration(cell["samples"], cell["size"], cell["seed"])
    method = DoubleSparseFactorizer(max_iter=cell["sweeps"])
    density, nbytes, names, found = cell["density"], 0, [""], {}
    for form in FORMS:
        start = time.process_time()
        weights = output_harm(dense.model, batches[:2], names) if form == "harm" else None
        amount: dict[str, Any] = {"density": density}
        if form != "uniform":
            tried = tuple(density * multiple for multiple in TRIED)
            amount = {"budget": Budget(nbytes, weights=weights, densities=tried)}
        small, report = compress(
            dense.model, method, layers=dense.layers, calibration=batches, **amount
        )
        if form == "uniform":
            nbytes, names = report.nbytes, [row.layer for row in report]
        found[form] = {
            **fresh.measure(dense, small, [], paired=False).outputs,
            "nbytes": report.nbytes, "seconds": time.process_time() - start,
        }  # fmt: skip
    return found


def table(rows: list[Row]) -> str:
    """Return a line for each network, density and form."""
    lines = []
    for row in rows:
        headline = KINDS[row["network"]].headline
        for form in FORMS:
            result = row[form]
            lines.append([
                row["network"], f"{row['density']:.0%}", form, headline,
                f"{result[headline].mean:.4f}", f"{result['output error'].mean:.4f}",
                f"{result['nbytes'].mean:,.0f}", f"{result['seconds'].mean:.0f}",
            ])  # fmt: skip
    header = ("network", "density", "form", "measure", "value", "output error", "bytes", "CPU s")
    return markdown_table(header, lines)


def figure(rows: list[Row]) -> Figure:
    """Draw the measure of each form relative to one density for all layers."""
    drawn = Figure(figsize=(5, 3.6), layout="constrained", dpi=150)
    axes = drawn.subplots()
    for row in rows:
        headline = KINDS[row["network"]].headline
        base = row["uniform"][headline].mean
        values = [row[form][headline].mean / base for form in FORMS]
        axes.plot(FORMS, values, marker="o", label=f"{row['network']}, {row['density']:.0%}")
    axes.set(ylabel="measure ÷ uniform")
    axes.legend(frameon=False)
    return drawn


STUDY = SimpleNamespace(SEEDS=SEEDS, cells=cells, run=measure, table=table, figure=figure)
