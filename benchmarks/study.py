"""Run or resume one of the papers' experiments.

Every finished cell is a line of ``cells.jsonl`` in the output folder and is not run again. At the
end, ``table.md``, ``figure.png`` and ``results.json`` are written.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine, studies
from benchmarks.studies import _cells, _report

NAMES = sorted(
    module.name.replace("_", "-")
    for module in pkgutil.iter_modules(studies.__path__)
    if not module.name.startswith("_")
)
_console = Console(highlight=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    add("--output", type=Path, help="output folder (build/studies/NAME)")
    add("--quick", action="store_true", help="smoke test with a small version")
    add("--seeds", type=int, help="repetitions of each cell (the study's own number; quick: 1)")
    add("--cells", default="", help="regular expression of the cells to run, as JSON")
    add("--n-jobs", type=int, default=1, help="number of parallel cells")
    add("--report", action="store_true", help="only write the results of finished cells")


def run(options: argparse.Namespace) -> int:
    if options.seeds is not None and options.seeds < 1:
        raise SystemExit(f"--seeds must be at least 1, got {options.seeds}.")
    return execute(load(options.name), options)


def execute(study: Any, options: argparse.Namespace) -> int:
    """Run the unfinished cells of `study`, a module or similar object, and write the results."""
    form = f"{options.name}-quick" if options.quick else options.name
    folder = options.output or Path("build/studies") / form
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cells.jsonl"
    seeds = options.seeds or (1 if options.quick else study.SEEDS)
    cells = _cells.with_seeds(study.cells(options.quick), seeds)
    known = _cells.load(file)
    todo = [cell for cell in cells if _cells.key(cell) not in known]
    chosen = [cell for cell in todo if re.search(options.cells, _cells.key(cell))]
    failures = 0 if options.report else _run(study, chosen, file, options)
    known = _cells.load(file)
    records = [known[_cells.key(cell)] for cell in cells if _cells.key(cell) in known]
    if not records:
        raise SystemExit(f"No cell of {options.name} is finished in {file}.")
    with machine.threads(options.threads):
        conditions = machine.describe(options.threads)
    _report.write(folder, study, conditions, records, _cells.rows(records))
    _console.print(f"{len(records)} of {len(cells)} cells; written to {folder}", markup=False)
    return 1 if failures else 0


def load(name: str) -> Any:
    """Return the module of a study."""
    return importlib.import_module(f"benchmarks.studies.{name.replace('-', '_')}")


def _run(study: Any, cells: list[_cells.Cell], file: Path, options: argparse.Namespace) -> int:
    """Run cells and store their records; return the number of failures."""
    failures = 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
        task = progress.add_task(options.name, total=len(cells))
        outcomes = _cells.run(study.run, cells, options.threads, options.n_jobs)
        for i, (cell, outcome) in enumerate(outcomes, start=1):
            if isinstance(outcome, str):
                failures += 1
            else:
                _cells.append(file, outcome)
            progress.console.print(f"{i}/{len(cells)} {_line(cell, outcome)}", markup=False)
            progress.advance(task)
    return failures


def _line(cell: _cells.Cell, outcome: _cells.Record | str) -> str:
    """Return the summary of a finished cell."""
    head = " ".join(f"{name}={value}" for name, value in cell.items())
    if isinstance(outcome, str):
        return f"{head}: failed\n{outcome}"
    shown = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in outcome["result"].items()
        if not isinstance(value, dict)
    )
    return f"{head}: {shown} ({outcome['cpu_seconds']:.1f} s)"
