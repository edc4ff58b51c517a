"""Compression of whole networks, pretrained or trained here.

Each benchmark is a module ``benchmarks/networks/some_name.py`` with a function ``run(quick, folder,
cells)``, which runs the cells that match a regular expression, writes results to the folder and
returns the exit status. The quick form needs no further data.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

NAMES = ("encoder", "language-model", "cnn", "calibration", "bits", "allocation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--output", type=Path, help="output folder (build/networks/NAME)")
    add("--quick", action="store_true", help="smoke test with a small version")
    add("--cells", default="", help="regular expression of the cells to run, as JSON")
    add("--data", help="folder of data sets (the environment's MATFACT_DATA)")


def run(options: argparse.Namespace) -> int:
    if options.data:
        os.environ["MATFACT_DATA"] = options.data
    form = f"{options.name}-quick" if options.quick else options.name
    folder = options.output or Path("build/networks") / form
    folder.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"benchmarks.networks.{options.name.replace('-', '_')}")
    return module.run(options.quick, folder, options.cells)
