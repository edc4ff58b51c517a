"""A handful of figures of each version, in ``benchmarks/history/VERSION.json``.

Errors at fixed seeds, bits, and times ÷ dense ones, printed beside those of the version before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import matfact as mf
from benchmarks import machine
from benchmarks.tables import markdown_table

FOLDER = Path(__file__).parent / "history"
DSF = mf.DoubleSparseFactorizer(density=0.25)
#: Estimators fitted to three Gaussian matrices of 256×256, with correlated inputs if they use them.
ERRORS = {
    "DSF, density 0.25": DSF,
    "Palm4MSA, density 0.25": mf.Palm4MSA(density=0.25, n_factors=2),
    "Monarch, density 0.25": mf.MonarchProjector(density=0.25),
    "DSF, density 0.4, 4 bits": mf.Quantized(mf.DoubleSparseFactorizer(density=0.4), bits=4),
    "double binary, 2 bits": mf.DoubleBinaryFactorizer(bits=2.0),
    "ADMM, density 0.1, outputs": mf.ADMMPruner(density=0.1),
    "GPTQ, 3 bits, outputs": mf.GPTQ(bits=3),
}
#: Products of 1024×1024.
PRODUCTS = {
    "DSF, density 0.25": mf.DoubleSparseFactorizer(density=0.25, max_iter=2),
    "butterfly": mf.ButterflyFit(chain="square_dyadic"),
    "Monarch, density 0.25": mf.MonarchProjector(density=0.25),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the history")


def run(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    with machine.threads(options.threads):
        # Other programs make times uncertain.
        conditions = {**machine.describe(options.threads), "load": os.getloadavg()[0]}
        content = {"machine": conditions, "figures": measured()}
    path = options.output / f"{mf.__version__}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(changes(options.output, mf.__version__))
    return 0


def measured() -> dict[str, float]:
    figures = {}
    for name, estimator in ERRORS.items():
        errors = []
        for seed in range(3):
            W, inputs = gaussian(seed, 256, 256), None
            if name.endswith("outputs"):
                inputs = gaussian(seed, 2000, 64) @ gaussian(seed + 10, 64, 256)
            estimator.fit(W, calibration=inputs)
            errors.append(estimator.reconstruction_err_ if inputs is None else estimator.layer_err_)
        figures[f"error of {name}"] = float(statistics.mean(errors))
    figures["bits a weight of DSF, density 0.25"] = float(DSF.bits_per_weight_)
    ratio = least(DSF.fit, W, repeats=7) / least(W.__matmul__, W)
    figures["time of a fit of DSF ÷ product of 256×256"] = ratio
    for name, estimator in PRODUCTS.items():
        product = estimator.fit(dense := gaussian(0, 1024, 1024)).operator_
        for batch in (1, 64):
            X = gaussian(1, 1024, batch)
            ratio = least(product.__matmul__, X) / least(dense.__matmul__, X)
            figures[f"time of a product ÷ dense, {name}, batch {batch}"] = ratio
    return figures


def gaussian(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def least(function: Callable[[Any], Any], operand: Any, repeats: int = 200) -> float:
    """Return the least time of a call, which other programs disturb least."""
    return min(timeit.repeat(lambda: function(operand), number=1, repeat=repeats))


def changes(folder: Path, version: str) -> str:
    """Return the figures of a version beside those of the version before it, as a table."""
    numbers = {tuple(map(int, path.stem.split("."))): path for path in folder.glob("*.json")}
    versions = sorted(n for n in numbers if n <= tuple(map(int, version.split("."))))
    *_, before, now = [{}, *(json.loads(numbers[n].read_text())["figures"] for n in versions)]
    lines = []
    for name, value in now.items():
        old = before.get(name, float("nan"))
        lines.append([name, *(f"{x:.4g}".replace("nan", "–") for x in (old, value, value / old))])
    return markdown_table(["figure", "version before", version, "ratio"], lines)
