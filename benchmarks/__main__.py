"""``python -m benchmarks NAME``: run one of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import os

NAMES = (
    "projection",
    "floor",
    "apply",
    "generate",
    "gpu",
    "busy",
    "scoring",
    "study",
    "butterfly",
    "layers",
    "startup",
    "networks",
    "fuzz",
    "readers",
    "synthetic",
    "writers",
    "cluster",
)
#: Read by numerical libraries when they are loaded, so set before any import.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    first = argparse.ArgumentParser(prog="benchmarks", description=__doc__, add_help=False)
    first.add_argument("benchmark", choices=NAMES)
    first.add_argument("--threads", type=int, default=1, help="number of threads")
    known, _ = first.parse_known_args(arguments)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(known.threads)
    module = importlib.import_module(f"benchmarks.{known.benchmark}")
    parser = argparse.ArgumentParser(description=module.__doc__, parents=[first])
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
