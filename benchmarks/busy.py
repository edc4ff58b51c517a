"""Slow-down of fits when other processes keep all cores busy.

The share of the processor is CPU time ÷ wall time, relative to the same on a quiet machine. The
"excess", busy time × share ÷ quiet time, is the slow-down not explained by the share. Run it with
as many threads as cores, on an otherwise quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.base import clone

import matfact
from benchmarks import machine

METHODS = {
    "DSF": matfact.DoubleSparseFactorizer(max_iter=10),
    "PALM": matfact.Palm4MSA(max_iter=10),
    "Butterfly": matfact.ButterflyFit(),
    "Butterfly 25 %": matfact.ButterflyFit(density=0.25, max_iter=2),
    "Kaleidoscope": matfact.KaleidoscopeFit(max_iter=5),
    "BlockSVD": matfact.BlockSVD(),
    "Monarch": matfact.MonarchProjector(),
    "LowRank": matfact.LowRank(),
    "ADMM": matfact.ADMMPruner(max_iter=10),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of repeats per case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=3.0, help="maximum allowed excess")
    parser.add_argument("--json", type=Path, help="output file")


def run(options: argparse.Namespace) -> int:
    conditions = machine.describe(options.threads)
    rows = []
    print(f"{'method':14} {'size':>5} {'quiet ms':>9} {'busy ms':>9} {'share':>6} {'excess':>6}")
    for name, size in itertools.product(options.methods, options.sizes):
        fit = _fit(name, size, options.seed)
        fit()  # compiles
        quiet, whole = min(_times(fit, options.seconds))
        with busy(os.cpu_count() or 1):
            times = zip(*_times(fit, options.seconds), strict=True)
            beside, part = (statistics.median(each) for each in times)
        share = (part / beside) / (whole / quiet)
        excess = beside * share / quiet
        rows.append(
            {"method": name, "size": size, "quiet": quiet, "busy": beside, "share": share}
            | {"excess": excess}
        )
        print(
            f"{name:14} {size:5} {1e3 * quiet:9.1f} {1e3 * beside:9.1f} {share:6.2f} {excess:6.2f}",
            flush=True,
        )
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    worst = max(row["excess"] for row in rows)
    print(
        f"\n{conditions['cpu']}, {options.threads} thread(s), float32, square matrices, "
        f"seed {options.seed}. {versions}. Largest excess {worst:.2f}."
    )
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))
    return int(worst > options.limit)


def _fit(name: str, size: int, seed: int) -> Callable[[], object]:
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((size, size), dtype=np.float32)
    X = rng.standard_normal((2 * size, size), dtype=np.float32)
    options = {"calibration": X} if name == "ADMM" else {}
    return lambda: clone(METHODS[name]).fit(W, **options)


def _times(fit: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """Return wall and CPU times of at least three fits, for at least `seconds`."""
    times: list[tuple[float, float]] = []
    while len(times) < 3 or sum(wall for wall, _ in times) < seconds:
        start = time.perf_counter(), time.process_time()
        fit()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` cores busy."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    time.sleep(1.0)  # until they have started
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
