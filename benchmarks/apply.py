"""Time to apply factors to a batch, compared with the dense matrix, in one process.

Weights rotate over enough layers to come from memory, as in a network; repeats are interleaved,
so that a slow moment of the machine falls on all, and the time of one thread is its own alone;
medians and their ratios to dense are reported.
The break-even table is what the library itself measures with ``FactorProduct.advise``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.applied import METHODS, STRUCTURES, Method, Structure
from benchmarks.tables import markdown_table
from matfact._files import write_atomically
from matfact.operators import FactorProduct

Row = dict[str, Any]
_SETTLE = 0.13  #: seconds after which the threads of other methods sleep
_WARM = 0.03  #: seconds of warm-up, in which threads wake up and spread over cores
DENSITIES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--sizes", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192], help="sides")
    add("--batches", type=int, nargs="*", default=[1, 16, 64, 256, 1024], help="batch sizes")
    add("--structures", nargs="*", default=list(STRUCTURES), choices=list(STRUCTURES))
    add("--methods", default="", help="regular expression of the methods to run besides dense")
    add("--repeats", type=int, default=7, help="timings of each method")
    add("--cache", type=float, default=64, help="MiB of dense weights to rotate over")
    add("--slow", type=float, default=0.5, help="time calls longer than this many seconds once")
    add("--resume", action="store_true", help="keep existing rows and measure the rest")
    add("--quick", action="store_true", help="smoke test with tiny matrices and one repeat")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.sizes, options.batches = [256], [1, 20]
        options.repeats, options.cache = 1, 0.5
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "apply.json"
    rows = json.loads(path.read_text())["rows"] if options.resume and path.exists() else []
    with machine.threads(options.threads):
        conditions = machine.describe(options.threads)
        advised = break_even(options)
        absent = [m.name for m in METHODS if not m.is_present()]
        for name, n in itertools.product(options.structures, options.sizes):
            known = {row["batch"] for row in rows if (row["structure"], row["n"]) == (name, n)}
            missing = [batch for batch in options.batches if batch not in known]
            for row in measure(name, STRUCTURES[name], n, missing, options) if missing else ():
                rows.append(row)
            content = {
                "conditions": conditions, "absent": absent, "rows": rows, "break_even": advised
            }  # fmt: skip
            write_atomically(path, json.dumps(content, indent=1, default=str).encode())
    text = markdown(conditions, absent, rows, advised)
    (options.output / "apply.md").write_text(text)
    print(text, end="")
    return 0


def measure(
    name: str, structure: Structure, n: int, batches: list[int], options: argparse.Namespace
) -> Iterator[Row]:
    """Yield a row for each batch size and method."""
    rng = np.random.RandomState(n)
    layers = max(2, round(options.cache * 2**20 / (4 * n * n)))
    products = [structure(n, rng) for _ in range(min(layers, 24))]
    chosen = [m for m in METHODS if m is METHODS[0] or re.search(options.methods, m.name)]
    methods = [m for m in chosen if m.is_present() and m.suits(name)]
    # The time does not depend on the values of a dense matrix.
    matrices = [rng.standard_normal(product.shape).astype(product.dtype) for product in products]
    pairs = list(zip(products, matrices, strict=True))
    prepared = {m.name: [m.prepare(*pair) for pair in pairs] for m in methods}
    for batch in batches:
        X = rng.standard_normal((n, batch)).astype(np.float32)
        seconds = interleaved(methods, prepared, X, options)
        check(prepared, methods, products[0], X)
        for method in methods:
            times = seconds[method.name]
            yield {
                "structure": name, "n": n, "batch": batch, "method": method.name,
                "stored": products[0].density, "layers": len(products), "seconds": times,
                "median_seconds": statistics.median(times),
                "ratio": statistics.median(times) / statistics.median(seconds["dense (BLAS)"]),
            }  # fmt: skip


def interleaved(
    methods: list[Method],
    prepared: dict[str, list[Callable[[Any], Any]]],
    X: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """Return the times of each method for one layer, the mean over a rotation."""
    # The time of a single thread leaves out what other processes take.
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    operands = {m.name: m.operand(X) for m in methods}
    times: dict[str, list[float]] = {m.name: [] for m in methods}
    for method in methods:  # compile and prepare
        for call in prepared[method.name]:
            call(operands[method.name])
    for _ in range(options.repeats):
        for method in methods:
            if times[method.name] and times[method.name][0] > options.slow:
                continue
            calls, operand = prepared[method.name], operands[method.name]
            warm(calls, operand, 0.0 if options.quick else _WARM)
            start = clock()
            for call in calls:
                call(operand)
            times[method.name].append((clock() - start) / len(calls))
            if options.threads > 1 and not options.quick:
                time.sleep(_SETTLE)
    return times


def warm(calls: list[Callable[[Any], Any]], operand: Any, seconds: float) -> None:
    """Run `calls` for a while."""
    stop = time.perf_counter() + seconds
    for call in itertools.cycle(calls):
        call(operand)
        if time.perf_counter() >= stop:
            break


def check(
    prepared: dict[str, list[Callable[[Any], Any]]],
    methods: list[Method],
    product: FactorProduct,
    X: np.ndarray,
) -> None:
    """Check that all methods give the same result."""
    exact = X.astype(np.float64)
    for factor in reversed(product.factors):
        exact = factor.apply(exact)
    for method in methods:
        if not method.is_exact:
            continue
        result = np.asarray(prepared[method.name][0](method.operand(X)))
        error = np.linalg.norm(result.reshape(exact.shape) - exact) / np.linalg.norm(exact)
        if error > 1e-4:
            raise AssertionError(f"{method.name} is off by {error:.1e}")


def break_even(options: argparse.Namespace) -> list[Row]:
    """Return the library's advice for shapes, densities and batches."""
    rows = []
    for n in options.sizes:
        if n > 2048:
            continue  # ratios hardly change beyond this
        for density in DENSITIES:
            product = STRUCTURES["sparse 25 %"](n, np.random.RandomState(0), density)
            for batch in options.batches:
                advice = product.advise(batch)
                rows.append({"n": n, "stored": product.density, **advice._asdict()})
    return rows


def markdown(
    conditions: dict[str, Any], absent: list[str], rows: list[Row], advised: list[Row]
) -> str:
    lines = [
        f"{conditions['cpu']}, {conditions['threads']} thread(s), float32. Median µs of one layer "
        "and, in brackets, ÷ dense (BLAS).",
    ]
    if absent:
        lines += ["", f"Not installed: {', '.join(absent)}."]
    for structure in dict.fromkeys(row["structure"] for row in rows):
        chosen = [row for row in rows if row["structure"] == structure]
        lines += ["", f"### {structure}", "", _times(chosen).rstrip()]
    if advised:
        lines += ["", "### Break-even of two sparse factors", ""]
        lines += ["Speed-up over dense; 'dense' if the factors are slower.", ""]
        lines.append(_speedups(advised).rstrip())
    return "\n".join(lines) + "\n"


def _times(rows: list[Row]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for n, batch in dict.fromkeys((row["n"], row["batch"]) for row in rows):
        line = {r["method"]: r for r in rows if (r["n"], r["batch"]) == (n, batch)}
        cells = [
            f"{line[m]['median_seconds'] * 1e6:.4g} ({line[m]['ratio']:.2f})" if m in line else "–"
            for m in methods
        ]
        lines.append((n, batch, *cells))
    return markdown_table(("n", "batch", *methods), lines)


def _speedups(rows: list[Row]) -> str:
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    lines = []
    for n, stored in dict.fromkeys((row["n"], row["stored"]) for row in rows):
        cells = []
        for row in rows:
            if (row["n"], row["stored"]) == (n, stored):
                speedup = row["dense_seconds"] / row["factors_seconds"]
                cells.append(f"{speedup:.1f}×" if speedup >= 1 else "dense")
        lines.append((n, f"{stored:.0%}", *cells))
    return markdown_table(("n", "stored", *(f"batch {b}" for b in batches)), lines)
