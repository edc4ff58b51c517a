"""What a GPU does: kernels against double precision, solvers, and times of each structure.

The most important measures come first, and results are written after each, so that a run that is
cut off is still worth something. ``--rehearse`` goes through the same steps on the CPU with tiny
matrices: its times mean nothing. Kernels are then interpreted by Triton, if TRITON_INTERPRET=1 is
set, and left out otherwise. The status is 1 if a result is wrong or a step fails, and 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import machine
from matfact._files import write_atomically

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=_minutes, default=10, help="time after which nothing new is started")
    add("--rehearse", action="store_true", help="go through all steps on the CPU, with tiny sizes")
    add("--output", type=Path, default=Path("build/benchmarks/gpu"), help="folder of results")


def _minutes(text: str) -> float:
    minutes = float(text)
    if not minutes > 0:  # nor is NaN
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return minutes


def run(options: argparse.Namespace) -> int:
    if not machine.is_installed("torch"):
        print("No benchmark: torch is not installed. Install a CUDA build of it.")
        return 2
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("No benchmark: torch finds no GPU. Rehearse the benchmark with --rehearse.")
        return 2
    from benchmarks.gpu import page, steps
    from benchmarks.gpu.device import Device

    device = Device(options.rehearse)
    conditions = machine.describe(options.threads) | device.describe()
    rows: list[Row] = []
    stop = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    for name, step in steps.STEPS.items():
        try:
            for row in step(device):
                rows.append({"step": name, **row})
                print(page.line(rows[-1]), flush=True)
                write(options.output, conditions, rows)
                if time.monotonic() > stop:
                    break
        except Exception as error:  # what follows may still work
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
            rows.append({"step": name, "failure": failure, "is_error": True})
        if time.monotonic() > stop:
            rows.append({"step": name, "failure": f"stopped after {options.minutes:g} minutes"})
            break
    write(options.output, conditions, rows)
    return 1 if any(page.is_wrong(row) or "is_error" in row for row in rows) else 0


def write(folder: Path, conditions: dict[str, Any], rows: list[Row]) -> None:
    """Write what was measured so far."""
    from benchmarks.gpu import page

    content = {"conditions": conditions, "rows": rows}
    # A run that is cut off while it writes keeps what it wrote before.
    write_atomically(folder / "gpu.json", json.dumps(content, indent=1, default=str).encode())
    write_atomically(folder / "gpu.md", page.markdown(conditions, rows).encode())
