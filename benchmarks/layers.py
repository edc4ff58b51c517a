"""Time of factorized PyTorch layers compared with ``torch.nn.Linear``, in one process.

Times are for a forward pass in eval mode, or with ``--training`` a forward and a backward pass,
averaged over enough layers to leave the cache, as in a network. Repeats are interleaved, so slow
moments of the machine affect all layers. Medians and their ratios to the dense layer are shown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import machine
from benchmarks.tables import markdown_table
from matfact.operators import Factor, FactorProduct, KroneckerSparseFactor
from matfact.solvers.chains import dyadic_chain
from matfact.torch import (
    ButterflyLinear,
    FactorizedLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    reset_parameters,
)

Row = dict[str, Any]
_SETTLE = 0.01  #: seconds after which the threads of other libraries sleep


def kaleidoscope(n: int) -> FactorizedLinear:
    """Return a butterfly times a reversed one."""
    down = dyadic_chain((n, n)).patterns
    patterns = [*down, *down[-2::-1]]
    factors: list[Factor] = [
        KroneckerSparseFactor(np.zeros((a, d, b, c), np.float32)) for a, b, c, d in patterns
    ]
    layer = FactorizedLinear(FactorProduct(factors), torch.zeros(n))
    reset_parameters(layer)
    return layer


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.Linear": lambda n: nn.Linear(n, n),
    "butterfly": lambda n: ButterflyLinear(n, n),
    "Kaleidoscope": kaleidoscope,
    "Monarch": lambda n: MonarchLinear(n, n),
    "sparse 10 %": lambda n: SparseProductLinear(n, n, density=0.1),
    "sparse 25 %": lambda n: SparseProductLinear(n, n, density=0.25),
    "low rank 25 %": lambda n: LowRankLinear(n, n, rank=n // 8),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--sizes", type=int, nargs="*", default=[512, 1024, 4096], help="widths")
    add("--batches", type=int, nargs="*", default=[1, 16, 64, 256], help="batch sizes")
    add("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    add("--repeats", type=int, default=7, help="timings of each layer")
    add("--cache", type=float, default=64, help="MiB of dense weights to rotate over")
    add("--training", action="store_true", help="forward and backward in training mode")
    add("--quick", action="store_true", help="smoke test with a small width and one repeat")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.sizes, options.batches, options.repeats, options.cache = [256], [2], 1, 0.5
    names = list(dict.fromkeys(["nn.Linear", *options.layers]))
    with machine.threads(options.threads):
        conditions = machine.describe(options.threads)
        importlib.import_module("matfact.kernels.fused")  # without which a process begins
        rows = [row for n in options.sizes for row in measure(n, names, options)]
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "training": options.training, "rows": rows}
    (options.output / "layers.json").write_text(json.dumps(content, indent=1, default=str))
    text = markdown(conditions, names, rows)
    (options.output / "layers.md").write_text(text)
    print(text, end="")
    return 0


def measure(n: int, names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each batch size and kind of layer."""
    torch.manual_seed(0)
    count = min(24, max(2, round(options.cache * 2**20 / (4 * n * n))))
    layers = {
        name: [LAYERS[name](n).train(options.training) for _ in range(count)] for name in names
    }
    step = train if options.training else infer
    for batch in options.batches:
        x = torch.randn(batch, n, requires_grad=options.training)
        times = interleaved({k: [*v] for k, v in layers.items()}, step, x, options)
        dense = statistics.median(times["nn.Linear"])
        for name in names:
            seconds = statistics.median(times[name])
            yield {
                "n": n, "batch": batch, "layer": name, "seconds": seconds, "ratio": seconds / dense,
                "rotation": count,
            }  # fmt: skip


def interleaved(
    layers: dict[str, list[nn.Module]],
    step: Callable[[nn.Module, torch.Tensor], None],
    x: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """Return the time of each kind of layer, averaged over a rotation."""
    for rotation in layers.values():  # compiles, and prepares each layer
        for layer in rotation:
            step(layer, x)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(options.repeats):
        for name, rotation in layers.items():
            step(rotation[-1], x)  # wakes up threads
            start = time.perf_counter()
            for layer in rotation:
                step(layer, x)
            times[name].append((time.perf_counter() - start) / len(rotation))
            if options.threads > 1:
                time.sleep(_SETTLE)
    return times


def infer(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def train(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def markdown(conditions: dict[str, Any], names: list[str], rows: list[Row]) -> str:
    """Return a table of microseconds and ratios."""
    versions = f"torch {conditions['peers']['torch']}, numba {conditions['versions']['numba']}"
    lines = [
        f"{conditions['cpu']}, {conditions['threads']} thread(s), float32, {versions}. Median µs "
        "of one layer and, in brackets, ÷ nn.Linear.",
        "",
    ]
    table = []
    for n, batch in dict.fromkeys((row["n"], row["batch"]) for row in rows):
        line = [r for r in rows if (r["n"], r["batch"]) == (n, batch)]
        cells = [f"{r['seconds'] * 1e6:.4g} ({r['ratio']:.2f})" for r in line]
        table.append((n, batch, *cells))
    return "\n".join([*lines, markdown_table(("n", "batch", *names), table)])
