"""How far the double sparse fit is from what the machine's arithmetic and memory allow.

The floor is ``operations ÷ measured matrix product rate + bytes ÷ measured bandwidth`` of the
schedule of paper 001, Algorithm 1; it knows nothing of caches or of the work a method saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.methods import BASELINES, OURS

METHODS = {m.name: m for m in (*OURS, *BASELINES) if m.name in ("matfact DSF", "published DSF")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    add("--sizes", type=int, nargs="*", default=[256, 1024, 2048], help="sides of the matrices")
    add("--outer", type=int, default=40, help="outer iterations")
    add("--inner", type=int, default=5, help="inner iterations, for the count alone")
    add("--density", type=float, default=0.25, help="stored values ÷ entries")
    add("--repeats", type=int, default=3, help="timings of each fit")
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="timed")
    add("--quick", action="store_true", help="a tiny matrix and one repeat")


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


def schedule(n: int, outer: int, inner: int) -> tuple[float, float]:
    """Return the floating point operations and bytes of a fit to an n×n float32 matrix.

    An outer iteration solves for each of the two factors: a Gram matrix, a right-hand side, one
    inverse of a symmetric matrix (n³), and a product and an elementwise pass an inner iteration
    (reading iterate, dual, right-hand side; writing dual and the next right-hand side).
    """
    products = 2 * 2 + 2 * inner
    return outer * (products * 2 + 2) * n**3, outer * 2 * inner * 5 * 4 * n**2


def measure(n: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the floor at one size and how each method compares with it."""
    rng = np.random.RandomState(0)
    W = rng.standard_normal((n, n)).astype(np.float32)
    operations, traffic = schedule(n, options.outer, options.inner)
    rate = 2 * n**3 / seconds(lambda: W @ W, 7)
    large = np.ones((3, 2**24), np.float32)
    bandwidth = large.nbytes / seconds(lambda: np.add(large[0], large[1], out=large[2]), 7)
    floor = operations / rate + traffic / bandwidth
    rows = []
    for name in options.methods:
        method = METHODS[name]
        row = {"n": n, "method": name, "gflops": rate / 1e9, "gbytes": bandwidth / 1e9,
               "operations": operations, "bytes": traffic, "floor": floor}  # fmt: skip
        if method.is_present():
            setting = {method.sweep[0]: options.outer}
            row["seconds"] = seconds(
                lambda m=method, s=setting: m.fit(W, options.density, **s), options.repeats
            )
        rows.append(row)
    return rows


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `call`, run once before."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| n | method | GFLOP/s | GB/s | floor, s | measured, s | measured ÷ floor |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        taken = row.get("seconds")
        result = f"{taken:.3g} | {taken / row['floor']:.2f}" if taken else "absent | –"
        rates = f"{row['gflops']:.0f} | {row['gbytes']:.1f} | {row['floor']:.3g}"
        lines.append(f"| {row['n']} | {row['method']} | {rates} | {result} |")
    return "\n".join(lines) + "\n"
