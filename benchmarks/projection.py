"""Errors and times of projections at one density: this library and others, in one process.

Every method fits every suitable matrix. Repeats are interleaved, so slow moments of the machine
affect all methods. Errors and stored values are computed from the dense factors, in double
precision, in the same way for all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, matrices, report
from benchmarks.matrices import Matrix
from benchmarks.methods import BASELINES, OURS, Method
from benchmarks.peers import PEERS

METHODS = (*OURS, *BASELINES, *PEERS)
LAYERS = r"attention.*(query|key|value|dense)|intermediate|output\.dense|attn_|ffn_|_proj"
Row = dict[str, Any]
Setting = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--density", type=float, default=0.25, help="stored values ÷ entries")
    add("--sizes", type=int, nargs="*", default=[256, 1024], help="sides, powers of two")
    add("--seed", type=int, default=0, help="seed of the random matrices")
    add("--repeats", type=int, default=3, help="timings of each fit")
    add("--slow", type=float, default=20.0, help="time fits longer than this once")
    add("--weights", type=Path, action="append", default=[], help="model file (repeatable)")
    add("--layers", default=LAYERS, help="regular expression of the layers of models")
    add("--per-shape", type=int, default=2, help="number of matrices per shape and model")
    add("--methods", default="", help="regular expression of the methods to run")
    add("--matrices", default="", help="regular expression of the matrices to run")
    add("--no-curves", action="store_true", help="skip the error-versus-time curves")
    add("--quick", action="store_true", help="smoke test with tiny matrices and one repeat")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.sizes, options.repeats = [32], 1
    with machine.threads(options.threads):
        conditions = machine.describe(options.threads)
        report.print_conditions(conditions, options)
        cases = [m for m in collect(options) if re.search(options.matrices, m.name)]
        methods = [m for m in METHODS if re.search(options.methods, m.name)]
        absent = [m.name for m in methods if not m.is_present()]
        present = [m for m in methods if m.is_present()]
        rows = [row for matrix in cases for row in measure(matrix, present, options)]
        curves = [] if options.no_curves else [
            trade_off(matrix, present, options) for matrix in curve_cases(cases)
        ]  # fmt: skip
    report.write(options, conditions, absent, rows, curves)
    return 0


def collect(options: argparse.Namespace) -> Iterator[Matrix]:
    """Yield the matrices asked for."""
    for size in options.sizes:
        yield from matrices.synthetic(size, options.seed)
        yield from matrices.transforms(size)
    for path in options.weights if options.quick else [None, *options.weights]:
        yield from matrices.trained(path, options.layers, options.per_shape)
        for size in options.sizes:
            yield from matrices.stacked(path, options.layers, size)


def curve_cases(cases: list[Matrix]) -> list[Matrix]:
    """Return the matrices whose curves are drawn: the first random one and the first trained."""
    by_kind = {m.group.split()[0]: m for m in reversed(cases) if not m.is_transform}
    return list(by_kind.values())[::-1]


def measure(
    matrix: Matrix, methods: Iterable[Method], options: argparse.Namespace
) -> Iterator[Row]:
    """Yield a row for each method that suits `matrix`."""
    entries = [(method, {}) for method in methods if method.suits(matrix.values)]
    for row in interleaved(matrix, entries, options):
        report.print_row(row)
        yield row


def trade_off(
    matrix: Matrix, methods: Iterable[Method], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the error and seconds of each method under several settings, and its progress."""
    swept = [m for m in methods if m.sweep and m.suits(matrix.values)]
    entries = [
        (method, {method.sweep[0]: value})
        for method in swept
        for value in (method.sweep[1][:2] if options.quick else method.sweep[1])
    ]
    rows = interleaved(matrix, entries, options)
    traces = {
        method.name: method.trace(matrix.values, options.density)
        for method in swept
        if method.trace
    }
    return {"matrix": matrix.name, "group": matrix.group, "rows": rows, "traces": traces}


def interleaved(
    matrix: Matrix, entries: list[tuple[Method, Setting]], options: argparse.Namespace
) -> list[Row]:
    """Fit every entry `repeats` times, in turns, and return a row for each."""
    rows = [new_row(matrix, method, setting) for method, setting in entries]
    for method in dict.fromkeys(method for method, _ in entries):
        warm_up(method, matrix.values, options.density)
    for _ in range(options.repeats):
        for (method, setting), row in zip(entries, rows, strict=True):
            if row["status"] == "ok" and max(row["seconds"], default=0.0) <= options.slow:
                fit_once(matrix, method, setting, row, options.density)
    for row in rows:
        row["median_seconds"] = statistics.median(row["seconds"]) if row["seconds"] else None
    return rows


def new_row(matrix: Matrix, method: Method, setting: Setting) -> Row:
    """Return the row of a fit that is still to be made."""
    row = {
        "matrix": matrix.name, "group": matrix.group, "shape": matrix.values.shape,
        "dtype": str(matrix.values.dtype), "method": method.name, "family": method.family,
        "setting": setting, "status": "ok", "message": "", "seconds": [],
    }  # fmt: skip
    if method.largest and matrix.values.size > method.largest**2:
        row |= {
            "status": "left out",
            "message": f"too slow beyond a side of {method.largest}",
        }
    return row


def warm_up(method: Method, W: np.ndarray, density: float) -> None:
    """Fit a corner of `W`, so that imports and compilation are not timed."""
    corner = np.ascontiguousarray(W[:32, :32])
    if method.suits(corner):
        with contextlib.suppress(Exception):  # the fit of W itself reports its failure
            method.fit(corner, density)


def fit_once(matrix: Matrix, method: Method, setting: Setting, row: Row, density: float) -> None:
    """Time one fit and, the first time, measure its result."""
    start = time.perf_counter()
    try:
        factors = method.fit(matrix.values, density, **setting)
        row["seconds"].append(time.perf_counter() - start)
        if len(row["seconds"]) == 1:
            row |= evaluate(matrix.values, factors())
    except Exception as error:  # a failure of a method is a result
        row |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}


def evaluate(W: np.ndarray, factors: list[np.ndarray]) -> dict[str, float]:
    """Return stored values and errors of a product, in double precision."""
    nnz = sum(int(np.count_nonzero(factor)) for factor in factors if factor.dtype != bool)
    wide = np.complex128 if np.iscomplexobj(W) else np.float64
    W, factors = W.astype(wide), [factor.astype(wide) for factor in factors]
    energies = np.sort(np.abs(W), axis=None) ** 2
    relative = np.linalg.norm(W - functools.reduce(np.matmul, factors)) / np.linalg.norm(W)
    pruned = np.sqrt(energies[: max(0, W.size - nnz)].sum() / energies.sum())
    return {
        "nnz": nnz,
        "density": nnz / W.size,
        "relative_error": float(relative),
        "normalized_error": float(relative / pruned) if pruned else None,
    }
