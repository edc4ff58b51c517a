"""Two sparse matrices in place of one, the time to apply them (Boža & Macko 2025, Table 5, Fig. 7).

Layers of 1024×1024 with random positions and values come one after the other, so that each comes
from memory. A layer is dense, one sparse matrix, or two that share its stored values; all are
applied in turns, by this library and by SciPy, on the threads of the run. Times are medians.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.applied import METHODS, two_sparse
from benchmarks.apply import check, interleaved
from benchmarks.harness import Row
from benchmarks.tables import markdown_table
from matfact.operators import FactorProduct

SEEDS = 1
STORED = (0.5, 0.25, 0.125, 0.05)
BATCHES = (1, 16, 64)
#: Timings of each way, by batch.
REPEATS = {1: 25, 16: 9, 64: 5}
DENSE = "dense (BLAS)"
LIBRARIES = ("matfact", "scipy CSR")
#: How many matrices share the stored values of a layer.
FACTORS = {"one": 1, "two": 2}


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    for batch in BATCHES[:2] if quick else BATCHES:
        for stored in STORED[1::2] if quick else STORED:
            yield {
                "side": 256 if quick else 1024, "layers": 4 if quick else 24, "batch": batch,
                "stored": stored, "repeats": 3 if quick else REPEATS[batch],
            }  # fmt: skip


def run(cell: dict[str, Any]) -> dict[str, Any]:
    side, rng = cell["side"], np.random.RandomState(cell["seed"])
    methods = {method.name: method for method in METHODS}
    ways: list[Any] = [methods[DENSE]]
    dense = rng.standard_normal((cell["layers"], side, side)).astype(np.float32)
    prepared = {DENSE: [W.__matmul__ for W in dense]}
    X = rng.standard_normal((side, cell["batch"])).astype(np.float32)
    for label, n_factors in FACTORS.items():
        products = [sparse(side, cell["stored"], n_factors, rng) for _ in range(cell["layers"])]
        for library in LIBRARIES:
            way = dataclasses.replace(methods[library], name=f"{library}, {label}")
            pairs = zip(products, dense, strict=True)
            prepared[way.name] = [methods[library].prepare(*pair) for pair in pairs]
            check(prepared, [way], products[0], X)
            ways.append(way)
    options = SimpleNamespace(repeats=cell["repeats"], slow=0.2, threads=1, quick=False)
    times = interleaved(ways, prepared, X, options)
    return {"milliseconds": {name: 1e3 * statistics.median(t) for name, t in times.items()}}


def sparse(side: int, stored: float, n_factors: int, rng: np.random.RandomState) -> FactorProduct:
    """Return a product of so many sparse matrices that share the stored values."""
    if n_factors == 2:
        return two_sparse(side, rng, stored)
    return FactorProduct(two_sparse(side, rng, 2 * stored).factors[:1])


def table(rows: Sequence[Row]) -> str:
    names = [f"{library}, {label}" for library in LIBRARIES for label in FACTORS]
    head = ["batch", "stored", DENSE, *names, *(f"two ÷ one, {library}" for library in LIBRARIES)]
    lines = []
    for row in rows:
        times = {name: spread.mean for name, spread in row["milliseconds"].items()}
        cells = (f"{times[name]:.3g} ({times[name] / times[DENSE]:.2f})" for name in names)
        ratios = (f"{times[f'{library}, two'] / times[f'{library}, one']:.2f}"
                  for library in LIBRARIES)  # fmt: skip
        stored = f"{row['stored']:.1%}"
        lines.append([row["batch"], stored, f"{times[DENSE]:.3g}", *cells, *ratios])
    side = rows[0]["side"]
    title = f"Milliseconds of a layer of {side}×{side} and, in brackets, ÷ dense"
    return f"{title}:\n\n{markdown_table(head, lines)}"


def figure(rows: Sequence[Row]) -> Figure:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    result = Figure(figsize=(4 * len(batches), 3.4), layout="constrained", dpi=100)
    panels = result.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches, strict=True):
        chosen = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["stored"])
        for library, colour in zip(LIBRARIES, ("#0072B2", "#D55E00"), strict=True):
            for label, style in zip(FACTORS, ("--", "-"), strict=True):
                points = [
                    (100 * row["stored"], row["milliseconds"][f"{library}, {label}"].mean
                     / row["milliseconds"][DENSE].mean)
                    for row in chosen
                ]  # fmt: skip
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, marker="o", markersize=3,
                    label=f"{library}, {label} matri{'x' if label == 'one' else 'ces'}",
                )  # fmt: skip
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set(title=f"batch {batch}", xlabel="stored values, %", yscale="log")
    panels[0].set_ylabel("time ÷ dense")
    panels[0].legend(frameon=False, fontsize=7)
    return result
