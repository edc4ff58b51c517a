"""Data files in ``docs/data/``: measured rows, from which pages are built."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


class PageError(ValueError):
    """A page asks for what is not there, or a data file is not as it must be."""


def read(path: Path) -> dict[str, Any]:
    """Return a data file, an empty one if there is none."""
    if not path.is_file():
        return {"sets": {}, "tables": {}}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def fits(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Return whether each field has the value asked for, or one of them."""
    return all(
        row.get(field) in (value if isinstance(value, list) else [value])
        for field, value in where.items()
    )


def take(results: Path, data: Path, target: str) -> None:
    """Replace a set of rows by those of a file that a benchmark wrote."""
    name, _, group = target.partition(":")
    path = data / f"{name}.json"
    content = read(path)
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PageError(f"--take: {results} cannot be read as JSON: {error}") from None
    if not group or not isinstance(found.get("rows"), list):
        raise PageError(f"--take needs a file with rows and --into FILE:SET, got {target}.")
    measured = {key: value for key, value in found.items() if key not in ("rows", "curves")}
    measured.get("options", {}).pop("output", None)  # a folder of this machine
    rows = [_flat(row) for row in found["rows"]]
    content["sets"][group] = {"measured": measured, "rows": rows}
    save(path, content)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a cell and its results, means and deviations, side by side."""
    flat: dict[str, Any] = {}
    for field, value in {**row, **row.get("cell", {}), **row.get("results", {})}.items():
        if isinstance(value, dict) and "mean" in value:
            flat |= {field: value["mean"], f"{field} ±": value["deviation"]}
            flat["count"] = value["count"]
        elif field not in ("cell", "results"):
            flat[field] = value
    return flat


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a data file with a row a line, so that changes are easy to see."""
    dump = functools.partial(json.dumps, ensure_ascii=False)
    sets = ",\n".join(
        f'{dump(name)}: {{"measured": {dump(group["measured"])},\n"rows": [\n'
        + ",\n".join(map(dump, group["rows"]))
        + "\n]}"
        for name, group in content["sets"].items()
    )
    tables = ",\n".join(
        f"{dump(name)}: {dump(table, indent=1)}" for name, table in content["tables"].items()
    )
    text = f'{{"sets": {{\n{sets}\n}},\n"tables": {{\n{tables}\n}}}}\n'
    path.write_text(text, encoding="utf-8")
