"""Time of double sparse fits compared with the limits of arithmetic and memory.

The floor is ``operations ÷ measured matrix product rate + bytes ÷ measured bandwidth`` of each
method's operations in float32, ignoring caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.methods import BASELINES, OURS
from benchmarks.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of one update of one of the two factors of an n×n matrix.

    Attributes
    ----------
    outer : int
        Default number of updates of each factor.
    operations : float
        Floating-point operations of an update ÷ n³.
    passes : int
        Arrays of n² entries read or written outside of matrix products.
    """

    outer: int
    operations: float
    passes: int


SCHEDULES = {
    # A Gram matrix and a right-hand side, products with an eighth of the entries (density 0.25),
    # three quarters of them on average while the factors fill up. Two steps, each with a Cholesky
    # factor (n³/3), two triangular solves (n³ each) and some fourteen arrays touched; and six for
    # the products and the objective.
    "matfact DSF": Schedule(100, 2 * 2 * (1 / 8) * (3 / 4) + 2 * (1 / 3 + 2), 2 * 14 + 6),
    # Two Gram matrices, a right-hand side, two LU inverses (2 n³ each) and six products, and
    # five steps of eighteen arrays, sorts not counted.
    "published DSF": Schedule(40, 3 * 2 + 2 * 2 + 6 * 2, 5 * 18),
}
METHODS = {m.name: m for m in (*OURS, *BASELINES) if m.name in SCHEDULES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    add("--sizes", type=int, nargs="*", default=[256, 1024, 2048], help="sides of the matrices")
    add("--outer", type=int, help="updates of each factor (default: the method's)")
    add("--density", type=float, default=0.25, help="stored values ÷ entries")
    add("--repeats", type=int, default=3, help="timings of each fit")
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="timed")
    add("--quick", action="store_true", help="smoke test with a tiny matrix and one repeat")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.sizes, options.repeats, options.outer = [48], 1, 2
    with machine.threads(options.threads):
        rows = [row for n in options.sizes for row in measure(n, options)]
        conditions = machine.describe(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"conditions": conditions, "rows": rows}, indent=1, default=str)
    (options.output / "floor.json").write_text(content)
    text = markdown(rows)
    (options.output / "floor.md").write_text(text)
    print(text, end="")
    return 0


def measure(n: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the floor of each method at one size, and the time of its fit."""
    W = np.random.RandomState(0).standard_normal((n, n)).astype(np.float32)
    rate, bandwidth = rates(n)
    rows = []
    for name in options.methods:
        method, schedule = METHODS[name], SCHEDULES[name]
        outer = options.outer or schedule.outer
        operations = 2 * outer * schedule.operations * n**3
        traffic = 2 * outer * schedule.passes * n**2 * W.itemsize
        row = {"n": n, "method": name, "outer": outer, "operations": operations, "bytes": traffic,
               "gflops": rate / 1e9, "gbytes": bandwidth / 1e9,
               "floor": operations / rate + traffic / bandwidth}  # fmt: skip
        if method.is_present():
            fit = functools.partial(method.fit, W, options.density, **{method.sweep[0]: outer})
            method.fit(W[:32, :32].copy(), options.density)  # imports and compiles
            row["seconds"] = seconds(fit, options.repeats)
        rows.append(row)
    return rows


def rates(n: int) -> tuple[float, float]:
    """Return operations per second of n×n matrix products, and bytes per second of a sum."""
    W = np.random.RandomState(0).standard_normal((n, n)).astype(np.float32)
    large = np.ones((3, 2**24), np.float32)
    bandwidth = large.nbytes / seconds(lambda: np.add(large[0], large[1], out=large[2]), 7)
    return 2 * n**3 / seconds(lambda: W @ W, 7), bandwidth


def layer_work(shape: tuple[int, int], density: float, outer: int) -> tuple[float, float]:
    """Return the operations and bytes of matfact DSF on a matrix of any shape.

    Counted as above: half of the values in each factor, three quarters of them on average, and two
    steps per factor.
    """
    side, length = sorted(shape)
    stored = density * side * length * 3 / 4  # of both factors, on average
    products = stored * (3 * side + length)
    solves = 2 * 2 * side**3 / 3 + 2 * 2 * side**2 * (side + length)
    entries = side * (side + length)
    passes = SCHEDULES["matfact DSF"].passes
    return outer * (products + solves), outer * passes * entries * 4.0


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `call`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def markdown(rows: list[dict[str, Any]]) -> str:
    head = ("n", "method", "updates", "GFLOP/s", "GB/s", "floor, s", "measured, s", "ratio")
    lines = []
    for row in rows:
        taken = row.get("seconds")
        rates = f"{row['gflops']:.0f}", f"{row['gbytes']:.1f}", f"{row['floor']:.3g}"
        result = (f"{taken:.3g}", f"{taken / row['floor']:.2f}") if taken else ("absent", "–")
        lines.append((row["n"], row["method"], row["outer"], *rates, *result))
    return markdown_table(head, lines)
