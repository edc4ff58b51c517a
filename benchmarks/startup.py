"""Time to the first answer, and of later passes, of a compressed encoder and the dense one.

Each start is a separate process, with the forms in turn; minima and medians are shown. Dense
weights are loaded by `transformers`, which maps them into memory without checks, and from a
checkpoint of this library, with verified checksums. With a cold cache, the files of the weights
were dropped from it before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.tables import markdown_table
from matfact.compare._weights import demo_folder

Row = dict[str, Any]
CHILD = Path(__file__).with_name("_one_start.py")
#: Forms of the encoder, and how to load them.
FORMS = {"dense": "transformers", "dense, checkpoint": "matfact", "compressed": "matfact"}
LAYERS = r"encoder\.layer\.\d"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/benchmarks/startup"), help="folder of files")
    add("--density", type=float, default=0.25, help="density of the 36 linear layers")
    add("--repeats", type=int, default=3, help="number of starts per form")
    add("--batches", type=int, nargs="*", default=[1, 32], help="batch sizes, in order")
    add("--tokens", type=int, default=32, help="tokens per sentence")
    add("--cold", action="store_true", help="use a cold cache; later passes are then not timed")


def run(options: argparse.Namespace) -> int:
    source = demo_folder()
    if source is None or not machine.is_installed("transformers"):
        print("transformers or the extra demo is not installed: nothing to run.")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    folders = prepared(source, options)
    start(next(iter(FORMS)), source, folders, options)  # compiles Python's modules
    rows = [
        {"form": form, **start(form, source, folders, options)}
        for _ in range(options.repeats)
        for form in FORMS
    ]
    conditions = machine.describe(options.threads)
    content = {"conditions": conditions, "cold": options.cold, "rows": rows}
    (options.output / "startup.json").write_text(json.dumps(content, indent=1, default=str))
    print(markdown(rows, conditions))
    return 0


def prepared(source: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Return the folder of each form, written if it is not there yet."""
    folders = {
        # A copy: what another process has mapped cannot be dropped from the cache.
        "dense": options.output / "transformers",
        "dense, checkpoint": options.output / "dense",
        "compressed": options.output / f"density-{options.density}",
    }
    for form, folder in folders.items():
        if folder.exists():
            continue
        if form == "dense":
            shutil.copytree(source, folder)
        else:
            write(source, folder, options.density if form == "compressed" else None)
    return folders


def write(source: Path, folder: Path, density: float | None) -> None:
    """Save the encoder; the few sweeps of its fit change values, which times do not depend on."""
    from transformers import AutoModel

    from matfact import DoubleSparseFactorizer
    from matfact.torch import compress, save_network

    model = AutoModel.from_pretrained(source).eval()
    if density is not None:
        method = DoubleSparseFactorizer(max_iter=3)
        model = compress(model, method, density=density, layers=LAYERS).model
    save_network(model, folder)


def start(form: str, source: Path, folders: dict[str, Path], options: argparse.Namespace) -> Row:
    """Return the times of one process."""
    if options.cold:
        for file in weights(folders[form]):
            drop(file)
    batches = [] if options.cold else options.batches
    arguments = [FORMS[form], source, folders[form], options.threads, options.tokens, batches]
    # Modules are compiled once for all processes, as where packages are installed.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(
        [sys.executable, CHILD, *map(str, arguments)],
        env=variables, check=True, capture_output=True, text=True,
    )  # fmt: skip
    times: Row = json.loads(result.stdout.splitlines()[-1])
    return times


def weights(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")


def drop(file: Path) -> None:
    """Drop a file from the cache of the system."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def markdown(rows: list[Row], conditions: Row) -> str:
    """Return a table of milliseconds: the fastest start and, in brackets, the median one."""
    batches = list(rows[0]["later"])
    header = ["", "load", "first pass", "both", *(f"batch {n}, later" for n in batches)]
    lines = []
    for form in FORMS:
        own = [row for row in rows if row["form"] == form]
        cells = [[row["load"] for row in own], [row["first"] for row in own]]
        cells.append([sum(pair) for pair in zip(*cells, strict=True)])
        cells += [[row["later"][n] for row in own] for n in batches]
        shown = [f"{min(c) * 1e3:.3g} ({statistics.median(c) * 1e3:.3g})" for c in cells]
        lines.append([form, *shown])
    setting = f"{conditions['cpu']}, {conditions['threads']} thread(s).\n\n"
    return setting + markdown_table(header, lines)
