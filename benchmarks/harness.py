"""Cells of a benchmark: run once, stored in a file, resumed, and averaged over seeds."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import matfact
from benchmarks import machine

#: File in the output folder, with a line per finished cell.
FILE = "cells.jsonl"
console = Console(highlight=False, soft_wrap=True)
#: Everything a result depends on, including its seed.
Cell = dict[str, Any]
#: A finished cell, as stored: ``cell``, ``result``, ``cpu_seconds``, ``finished``, ``matfact``.
Record = dict[str, Any]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; formats as ``0.912 ± 0.003``."""

    mean: float
    deviation: float
    count: int

    def __format__(self, spec: str) -> str:
        if self.count == 1:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.deviation:{spec}}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell with its results over all seeds; ``row[name]`` reads either.

    Attributes
    ----------
    cell : dict
        Parameters, without the seed.
    results : dict
        For each result a `Spread` where it is a number, a dict of such where it is a
        dict, and otherwise what it was for the first seed.
    """

    cell: Cell
    results: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.cell[name] if name in self.cell else self.results[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return ``self[name]``, or `default` where there is no such parameter or result."""
        return self[name] if name in self.cell or name in self.results else default


def key(cell: Cell) -> str:
    """Return the key of a cell."""
    return json.dumps(cell, sort_keys=True)


def with_seeds(cells: Iterable[Cell], seeds: int) -> list[Cell]:
    """Return the cells for all seeds, seed after seed."""
    cells = list(cells)
    fixed = [cell for cell in cells if "seed" in cell]
    free = [cell for cell in cells if "seed" not in cell]
    return fixed + [{**cell, "seed": seed} for seed in range(seeds) for cell in free]


def load(path: Path) -> dict[str, Record]:
    """Return the finished cells of a file, without truncated lines."""
    records = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[key(record["cell"])] = record
    return records


def append(path: Path, record: Record) -> None:
    """Append a finished cell in one write, so that lines of parallel processes never mix."""
    line = json.dumps(record) + "\n"
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        line = "\n" + line  # a run was killed while it wrote
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def finish(
    title: str,
    function: Callable[[Cell], dict[str, Any]],
    cells: Sequence[Cell],
    file: Path,
    *,
    pattern: str = "",
    threads: int = 1,
    n_jobs: int = 1,
) -> int:
    """Run the unfinished cells and store their records; return the number of failures.

    Parameters
    ----------
    title : str
        Label of the progress bar.
    function : callable
        Returns the results of a cell.
    cells : sequence of dict
        All cells.
    file : Path
        File of the finished cells.
    pattern : str
        Regular expression of the cells to run, as JSON.
    threads, n_jobs : int
        Threads per cell, and number of parallel cells.
    """
    known = load(file)
    try:
        chosen = re.compile(pattern)
    except re.error as error:
        raise SystemExit(
            f"--cells must be a regular expression, got {pattern!r}: {error}."
        ) from None
    todo = [cell for cell in cells if key(cell) not in known and chosen.search(key(cell))]
    failures = 0
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(todo))
        for i, (cell, outcome) in enumerate(_run(function, todo, threads, n_jobs), start=1):
            if isinstance(outcome, str):
                failures += 1
            else:
                append(file, outcome)
            progress.console.print(f"{i}/{len(todo)} {_line(cell, outcome)}", markup=False)
            progress.advance(task)
    return failures


def _line(cell: Cell, outcome: Record | str) -> str:
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


def _run(
    function: Callable[[Cell], dict[str, Any]], cells: Sequence[Cell], threads: int, n_jobs: int
) -> Iterator[tuple[Cell, Record | str]]:
    """Yield cells as they end, each with its record or with the traceback of its failure."""
    pool = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)
    yield from pool(joblib.delayed(_run_one)(function, cell, threads) for cell in cells)


def _run_one(
    function: Callable[[Cell], dict[str, Any]], cell: Cell, threads: int
) -> tuple[Cell, Record | str]:
    start = time.process_time()
    try:
        with machine.threads(threads):
            result = function(dict(cell))
    except Exception:  # a failed cell must not end the study
        return cell, traceback.format_exc()
    return cell, {
        "cell": cell,
        "result": result,
        "cpu_seconds": round(time.process_time() - start, 3),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "matfact": matfact.__version__,
    }


def rows(records: Iterable[Record]) -> list[Row]:
    """Return one row per cell, over all of its seeds, in order."""
    groups: dict[str, tuple[Cell, list[dict[str, Any]]]] = {}
    for record in records:
        cell = {name: value for name, value in record["cell"].items() if name != "seed"}
        groups.setdefault(key(cell), (cell, []))[1].append(record["result"])
    return [Row(cell, _combine(results)) for cell, results in groups.values()]


def _combine(values: list[Any]) -> Any:
    """Return the spread of numbers, at the leaves of dicts; the first one of other values."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, dict) for value in known):
        names = dict.fromkeys(name for value in known for name in value)
        return {name: _combine([v[name] for v in known if name in v]) for name in names}
    if known and all(isinstance(value, (bool, int, float)) for value in known):
        deviation = statistics.stdev(known) if len(known) > 1 else 0.0
        return Spread(statistics.fmean(known), deviation, len(known))
    return known[0] if known else None
