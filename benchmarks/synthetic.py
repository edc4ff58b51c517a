"""Compress a synthetic checkpoint with the layer shapes of a 7B network.

Writes a file of a few blocks (4096 wide, 11008 in the middle, bfloat16), compresses it in a
separate process, and reports the time and peak memory of that process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from matfact._files import write_atomically
from matfact._safetensors import TensorSpec, serialize, to_bfloat16
from matfact.compare._environment import environment

WIDTH, MIDDLE, VOCABULARY = 4096, 11008, 32000
_CHUNK = 1 << 22  #: entries drawn at a time


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a network of the Llama family with a number of blocks."""
    square, up, down = (WIDTH, WIDTH), (MIDDLE, WIDTH), (WIDTH, MIDDLE)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(blocks):
        block = f"model.layers.{i}"
        found |= {f"{block}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        found |= {f"{block}.mlp.{name}_proj.weight": up for name in ("gate", "up")}
        found |= {f"{block}.mlp.down_proj.weight": down}
        found |= {f"{block}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "output")}
    return found


def write(path: Path, blocks: int) -> int:
    """Write the file, drawing a few numbers at a time; return its size."""
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(blocks).items()}
    rng = np.random.default_rng(0)

    def content() -> Iterator[bytes]:
        for spec in specs.values():
            left = spec.nbytes // 2
            while left:
                count = min(left, _CHUNK)
                left -= count
                yield to_bfloat16(rng.standard_normal(count, np.float32) * 0.02).tobytes()

    write_atomically(path, serialize(specs, content(), {"format": "pt"}))
    return path.stat().st_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=2, help="blocks of 405 MB each")
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--folder", type=Path, default=Path("synthetic"), help="for the files")


def run(arguments: argparse.Namespace) -> int:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source, out = arguments.folder / "model.safetensors", arguments.folder / arguments.method
    size = write(source, arguments.blocks)
    words = ["compress", str(source), str(out)]
    words += ["--method", arguments.method, "--density", str(arguments.density)]
    start = time.perf_counter()
    code = "import sys; from matfact.cli import app; app(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "command": " ".join(["matfact", *words]),
        "source_bytes": size,
        "largest_layer_bytes": 2 * WIDTH * MIDDLE,
        "seconds": time.perf_counter() - start,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "machine": environment(),
    }
    print(json.dumps(result, indent=1))
    return done.returncode
