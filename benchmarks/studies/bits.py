"""Errors at equal bytes: factorizations with quantized values against quantization alone.

Every method approximates the attention matrices and the rectangular matrices of a trained
sentence transformer (the extra ``demo``) in the same number of bits a weight, as files hold them;
a method with a density chooses it, and how many bits a value takes. Each seed is another matrix.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import Row
from benchmarks.tables import markdown_table
from matfact import (
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    RoundToNearest,
)
from matfact.compare._weights import load_weights
from matfact.factorizers._at_bits import fit_at_bits

SEEDS = 1
BITS = (2.5, 2.0, 3.25, 4.25, 3.0, 4.0, 8.25)
METHODS = {
    "RTN": RoundToNearest(),
    "DBF": DoubleBinaryFactorizer(max_iter=300),
    "DBF, 900 sweeps": DoubleBinaryFactorizer(max_iter=900),
    "DSF": DoubleSparseFactorizer(max_iter=200),
    "DSF, 400 sweeps": DoubleSparseFactorizer(max_iter=400),
    "magnitude": MagnitudePruner(),
    "low rank": LowRank(),
    "Monarch": MonarchProjector(),
}
#: Shapes of matrices, regular expressions of their names, and how many there are.
GROUPS = {"384×384": ("attention", 24), "1536×384, 384×1536": (r"layer\.\d\.(inter|out)", 12)}
#: Methods whose errors are far larger are measured on fewer matrices.
FEWER = {"low rank": 4, "Monarch": 4}


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the cells, budget after budget."""
    for bits in (2.5,) if quick else BITS:
        for group, (_, count) in GROUPS.items():
            for method in METHODS:
                for seed in range(1 if quick else min(count, FEWER.get(method, count))):
                    yield {"bits": bits, "group": group, "method": method, "quick": quick,
                           "seed": seed}  # fmt: skip


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Fit one matrix."""
    W, estimator = matrix(cell["group"], cell["seed"]), METHODS[cell["method"]]
    if cell["quick"]:
        W = W[:64, :64]
    start = time.process_time()
    fitted = fit_at_bits(estimator, W, cell["bits"])
    return {
        "error": fitted.reconstruction_err_,
        "stored": fitted.bits_per_weight_,
        "file": 8 * fitted.operator_.nbytes("stored") / W.size,
        "flops": fitted.operator_.flops_ratio,
        "density": fitted.density_,
        "value_bits": getattr(fitted, "bits", 0),
        "seconds": time.process_time() - start,
    }


def matrix(group: str, seed: int) -> np.ndarray:
    """Return the matrix of a group with a number."""
    weights = load_weights()
    names = [n for n in weights if re.search(GROUPS[group][0], n) and min(weights[n].shape) > 2]
    return np.ascontiguousarray(weights[names[seed]], dtype=np.float32)


def table(rows: list[Row]) -> str:
    """Return a line for each budget and method."""
    header = (
        "matrices", "bits", "method", "relative error", "stored", "with the file's header",
        "density", "bits of a value", "FLOPs ÷ dense", "CPU s",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["group"], row["bits"], row["error"].mean))
    lines = [
        (f"{row['error'].count} of {row['group']}", f"{row['bits']:g}", row["method"],
         f"{row['error'].mean:.4f} ± {row['error'].deviation:.4f}", f"{row['stored'].mean:.3f}",
         f"{row['file'].mean:.3f}", f"{row['density'].mean:.3f}", f"{row['value_bits'].mean:.1f}",
         f"{row['flops'].mean:.2f}", f"{row['seconds'].mean:.1f}")
        for row in ordered
    ]  # fmt: skip
    return markdown_table(header, lines)


def figure(rows: list[Row]) -> Figure:
    """Draw errors against bits and against FLOPs, a row for each group."""
    drawn = Figure(figsize=(8.4, 6.4), layout="constrained", dpi=150)
    panels = drawn.subplots(len(GROUPS), 2, sharey="row")
    for group, axes in zip(GROUPS, panels, strict=True):
        for method in METHODS:
            chosen = [row for row in rows if (row["group"], row["method"]) == (group, method)]
            chosen.sort(key=lambda row: row["bits"])
            errors = [row["error"].mean for row in chosen]
            for panel, name in zip(axes, ("stored", "flops"), strict=True):
                panel.plot([row[name].mean for row in chosen], errors, marker="o", label=method)
        axes[0].set(ylabel=f"relative error, {group}", yscale="log")
    for panel, name in zip(panels[-1], ("bits a weight", "FLOPs ÷ dense"), strict=True):
        panel.set_xlabel(name)
    panels[0][0].legend(frameon=False)
    return drawn
