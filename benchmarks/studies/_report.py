"""Output of a study: ``results.json``, ``table.md`` and ``figure.svg``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.harness import Record, Row


def write(
    folder: Path, study: Any, conditions: dict[str, Any], records: list[Record], rows: list[Row]
) -> None:
    """Write the files of a study from its finished cells."""
    content = {
        "conditions": conditions,
        "cells": len(records),
        "seeds": sorted({record["cell"]["seed"] for record in records}),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1),
        "finished": max(record["finished"] for record in records),
        "rows": [{"cell": row.cell, "results": as_json(row.results)} for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1, default=str))
    (folder / "table.md").write_text(f"{describe(content)}\n\n{study.table(rows)}")
    figures.save(lambda: study.figure(rows), folder / "figure.svg")


def describe(content: dict[str, Any]) -> str:
    """Return the paragraph above a table: date, machine and versions."""
    conditions = content["conditions"]
    versions = ", ".join(f"{k} {v}" for k, v in conditions["versions"].items())
    return (
        f"{content['finished'][:10]}, {conditions['cpu']}, {conditions['threads']} thread(s), "
        f"{content['cells']} cells, seeds {', '.join(map(str, content['seeds']))}, "
        f"{content['cpu_seconds'] / 60:.1f} minutes of CPU. {versions}."
    )


def as_json(value: Any) -> Any:
    """Return results with their spreads as dicts."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    return {k: as_json(v) for k, v in value.items()} if isinstance(value, dict) else value
