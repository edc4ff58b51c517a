"""Time per tensor to write networks of many tiny tensors, which should not depend on their number.

A file has `count` layers of 4×4 matrices, each of which ``compress`` writes to a separate file.
``resume`` is the same call on the finished folder, which checks every file, and ``save`` writes the
factors from memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import machine
from benchmarks.tables import markdown_table
from matfact import MagnitudePruner
from matfact.checkpoint import Checkpoint, compress, decompress, save

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--counts", type=int, nargs="*", default=[250, 500, 1000, 2000, 4000], help="of tensors")


def run(options: argparse.Namespace) -> int:
    with machine.threads(options.threads):
        measure(2)  # compiles
        rows = [measure(count) for count in options.counts]
        conditions = machine.describe(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "rows": rows}
    (options.output / "writers.json").write_text(json.dumps(content, indent=1, default=str))
    kinds = list(rows[0]["seconds"])
    cells = [
        [r["count"], *(f"{1e3 * r['seconds'][k] / r['count']:.2f}" for k in kinds)] for r in rows
    ]
    print(markdown_table(["tensors", *kinds], cells))
    return 0


def measure(count: int) -> Row:
    """Return the seconds of each way of writing `count` tensors."""
    rng, method = np.random.default_rng(0), MagnitudePruner(density=0.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = folder / "model.safetensors", folder / "out"
        weights = {f"{i}.weight": rng.standard_normal((4, 4), np.float32) for i in range(count)}
        save_file(weights, source)
        product = method.fit(weights["0.weight"]).operator_
        seconds = {
            "compress": timed(lambda: compress(source, out, method)),
            "resume": timed(lambda: compress(source, out, method)),
            "decompress": timed(lambda: decompress(out, folder / "dense")),
            "save": timed(lambda: save(folder / "saved", dict.fromkeys(weights, product))),
        }
        assert len(Checkpoint(out)) == len(Checkpoint(folder / "saved")) == count
    return {"count": count, "seconds": seconds}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
