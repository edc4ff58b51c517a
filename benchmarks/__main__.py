"""``python -m benchmarks NAME``: run one of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

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
    "pages",
    "figures",
    "history",
)
#: Read by numerical libraries when they are loaded, so set before any import.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    first = argparse.ArgumentParser(prog="benchmarks", description=__doc__, add_help=False)
    first.add_argument("benchmark", choices=NAMES)
    first.add_argument("--threads", type=_count, default=1, help="number of threads")
    known, _ = first.parse_known_args(arguments)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(known.threads)
    module = importlib.import_module(f"benchmarks.{known.benchmark}")
    parser = argparse.ArgumentParser(description=module.__doc__, parents=[first])
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    if file := _file_on_the_way(getattr(options, "output", None)):
        parser.error(f"argument --output: must name a folder, but {file} is a file")
    return module.run(options)


def _count(text: str) -> int:
    """Return a number of threads, of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def _file_on_the_way(folder: Path | None) -> Path | None:
    """Return what keeps a folder from being made, so that no run fails after hours."""
    places = [folder, *folder.parents] if folder else []
    return next((place for place in places if place.exists() and not place.is_dir()), None)


if __name__ == "__main__":
    raise SystemExit(main())
