"""A handful of figures of each version, in ``benchmarks/history/VERSION.json``.

Errors at fixed seeds, bits, and times ÷ dense ones, printed beside those of the version before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
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
    "DSF, density 0.5": mf.DoubleSparseFactorizer(density=0.5),
    "Palm4MSA, density 0.25": mf.Palm4MSA(density=0.25, n_factors=2),
    "Monarch, density 0.25": mf.MonarchProjector(density=0.25),
    "low rank, density 0.25": mf.LowRank(density=0.25),
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
    with machine.threads(options.threads):
        described = machine.describe(options.threads)
        described["load"] = os.getloadavg()[0]  # other programs make times uncertain
        content = {"machine": described, "figures": measured()}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{mf.__version__}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(changes(options.output, mf.__version__))
    return 0


def measured() -> dict[str, float]:
    """Return all figures by name."""
    figures = {}
    for name, estimator in ERRORS.items():
        uses_inputs = name.endswith("outputs")
        errors = []
        for seed in range(3):
            inputs = gaussian(seed, 2000, 64) @ gaussian(seed + 10, 64, 256)
            estimator.fit(gaussian(seed, 256, 256), calibration=inputs if uses_inputs else None)
            errors.append(estimator.layer_err_ if uses_inputs else estimator.reconstruction_err_)
        figures[f"error of {name}"] = float(statistics.mean(errors))
    figures["bits a weight of DSF, density 0.25"] = float(DSF.bits_per_weight_)
    figures["CPU time of a fit ÷ 1000 products, DSF"] = fit_time(DSF, gaussian(0, 256, 256))
    for name, estimator in PRODUCTS.items():
        product = estimator.fit(gaussian(0, 1024, 1024)).operator_
        for batch in (1, 64):
            ratio = statistics.median(1 / product.advise(batch).speedup for _ in range(7))
            figures[f"time of a product ÷ dense, {name}, batch {batch}"] = ratio
    return figures


def gaussian(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def fit_time(estimator: Any, W: np.ndarray) -> float:
    """Return the CPU time of a fit ÷ that of a thousand dense products, the median of five."""
    ratios = []
    for _ in range(6):  # the first one compiles
        start = time.process_time()
        estimator.fit(W)
        middle = time.process_time()
        for _ in range(1000):
            W @ W
        ratios.append((middle - start) / (time.process_time() - middle))
    return statistics.median(ratios[1:])


def changes(folder: Path, version: str) -> str:
    """Return the figures of a version beside those of the version before it, as a table."""
    numbers = {tuple(map(int, path.stem.split("."))): path for path in folder.glob("*.json")}
    versions = sorted(n for n in numbers if n <= tuple(map(int, version.split("."))))
    *_, before, now = [{}, *(json.loads(numbers[n].read_text())["figures"] for n in versions)]
    lines = [
        [name, *(f"{x:.4g}" for x in (before[name], value, value / before[name]))]
        if name in before
        else [name, "–", f"{value:.4g}", "–"]
        for name, value in now.items()
    ]
    return markdown_table(["figure", "version before", version, "ratio"], lines)
