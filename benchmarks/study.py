"""Run or resume one of the papers' experiments.

Every finished cell is a line of ``cells.jsonl`` in the output folder and is not run again. At the
end, ``table.md``, ``figure.svg`` and ``results.json`` are written.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from benchmarks import harness, machine, studies
from benchmarks.studies import _report

NAMES = sorted(
    module.name.replace("_", "-")
    for module in pkgutil.iter_modules(studies.__path__)
    if not module.name.startswith("_")
)


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
    form = f"{options.name}-quick" if options.quick else options.name
    return execute(
        load(options.name), options.name, options.output or Path("build/studies") / form,
        quick=options.quick, seeds=options.seeds, pattern=options.cells, report=options.report,
        threads=options.threads, n_jobs=options.n_jobs,
    )  # fmt: skip


def execute(
    study: Any,
    name: str,
    folder: Path,
    *,
    quick: bool,
    seeds: int | None = None,
    pattern: str = "",
    report: bool = False,
    threads: int = 1,
    n_jobs: int = 1,
) -> int:
    """Run the unfinished cells of `study`, a module or similar object, and write the results."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / harness.FILE
    cells = harness.with_seeds(study.cells(quick), seeds or (1 if quick else study.SEEDS))
    failures = 0
    if not report:
        failures = harness.finish(
            name, study.run, cells, file, pattern=pattern, threads=threads, n_jobs=n_jobs
        )
    known = harness.load(file)
    records = [known[harness.key(cell)] for cell in cells if harness.key(cell) in known]
    if not records:
        raise SystemExit(f"No cell of {name} is finished in {file}.")
    with machine.threads(threads):
        conditions = machine.describe(threads)
    _report.write(folder, study, conditions, records, harness.rows(records))
    harness.console.print(
        f"{len(records)} of {len(cells)} cells; written to {folder}", markup=False
    )
    return 1 if failures else 0


def load(name: str) -> Any:
    """Return the module of a study."""
    return importlib.import_module(f"benchmarks.studies.{name.replace('-', '_')}")
