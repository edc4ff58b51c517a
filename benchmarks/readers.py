"""CPU time and memory of readers per tensor, for growing numbers of tensors.

Linear growth shows as columns of equal numbers.
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

from benchmarks import machine
from benchmarks.memory import reset_peak, resident

ENTRY = np.ones((2, 2), np.float32)
Write, Read = Callable[[Path, int], object], Callable[[Path], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--tensors", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="tensors per file")
    add("--reader", action="append", choices=READERS, help="only this reader (repeatable)")


def run(options: argparse.Namespace) -> int:
    print(f"{'reader':<12} {'tensors':>9} {'seconds':>8} {'µs each':>8} {'bytes each':>10}")
    rows = []
    with machine.threads(options.threads):
        for name in options.reader or READERS:
            warm_up(name)
            for count in options.tensors:
                rows.append(row := measured(name, count))
                print(
                    f"{name:<12} {count:>9} {row['seconds']:>8.2f} "
                    f"{1e6 * row['seconds'] / count:>8.1f} {(row['memory'] or 0) / count:>10.0f}",
                    flush=True,
                )
    result = {"conditions": machine.describe(options.threads), "rows": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "readers.json").write_text(json.dumps(result, indent=1, default=str))
    return 0


def warm_up(name: str) -> None:
    """Import lazily loaded libraries."""
    measured(name, 10)


def measured(name: str, count: int) -> dict[str, Any]:
    """Return the seconds, and if known the bytes of memory, to read `count` tensors."""
    write, read = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m.{name}"
        write(path, count)
        before = reset_peak()
        start = time.process_time()
        held = read(path)
        seconds = time.process_time() - start
        memory = None if before is None else (resident("VmHWM") or 0) - before
        del held
    return {"reader": name, "tensors": count, "seconds": seconds, "memory": memory}


def _write_safetensors(path: Path, count: int) -> None:
    from matfact._files import write_atomically
    from matfact._safetensors import serialize, stored

    spec, data = stored(ENTRY)
    specs = {f"layers.{i}.weight": spec for i in range(count)}
    write_atomically(path, serialize(specs, (data for _ in specs), {}))


def _write_npz(path: Path, count: int) -> None:
    with path.open("wb") as file:
        np.savez(file, **{f"layers.{i}.weight": ENTRY for i in range(count)})


def _write_torch(path: Path, count: int) -> None:
    import torch

    torch.save({f"layers.{i}.weight": torch.ones(2, 2) for i in range(count)}, path)


def _write_factors(path: Path, count: int) -> None:
    from matfact.operators import DenseFactor, FactorProduct

    FactorProduct([DenseFactor(ENTRY)] * count).save(path)


def _write_checkpoint(path: Path, count: int) -> None:
    from matfact import checkpoint

    checkpoint.save(path, {f"layers.{i}.weight": ENTRY for i in range(count)})


def _read_header(path: Path) -> object:
    from matfact._safetensors_file import SafetensorsFile

    return SafetensorsFile(path)


def _read_source(path: Path) -> object:
    from matfact.checkpoint._source import Source

    source = Source(path)
    return source, source.digests(), source.matrices()


def _read_weights(path: Path) -> object:
    from matfact.compare import load_weights

    return load_weights(path)


def _read_stored(path: Path) -> object:
    from matfact.compare import load_weights

    return load_weights(path, stored=True)


def _read_product(path: Path) -> object:
    from matfact.operators import FactorProduct

    return FactorProduct.load(path)


def _read_checkpoint(path: Path) -> object:
    from matfact.checkpoint import Checkpoint

    network = Checkpoint(path)
    network.verify()
    return dict(network)


#: Functions that write a file with a number of tensors, and that read it.
READERS: dict[str, tuple[Write, Read]] = {
    "header": (_write_safetensors, _read_header),
    "source": (_write_safetensors, _read_source),
    "safetensors": (_write_safetensors, _read_weights),
    "stored.safetensors": (_write_safetensors, _read_stored),
    "npz": (_write_npz, _read_weights),
    "pt": (_write_torch, _read_weights),
    "factors": (_write_factors, _read_product),
    "checkpoint": (_write_checkpoint, _read_checkpoint),
}
