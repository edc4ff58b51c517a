"""Results as lines for the terminal and as a page."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import markdown_table

Row = dict[str, Any]
_TITLES = {
    "kernels": "Kernels against double precision",
    "solvers": "Double sparse factorization",
    "matrices": "One stored matrix on each road",
    "layers": "Layers in eval mode, called from Python and in a graph",
    "training": "A step of training",
    "methods": "Fits against the host in double precision",
    "network": "Networks from end to end, by samples or tokens",
}
_COLUMNS = {
    "structure": "structure", "weights": "weights", "road": "road", "dtype": "dtype",
    "size": "size", "batch": "batch", "seconds": "µs", "predicted": "predicted µs",
    "dense": "dense µs", "error": "error", "limit": "at most", "share": "share of the rate",
    "rate": "TFLOP/s", "failure": "failure",
}  # fmt: skip


def is_wrong(row: Row) -> bool:
    """Whether a result is less exact than it must be."""
    return "limit" in row and not row["error"] <= row["limit"]


def line(row: Row) -> str:
    """Return a row for the terminal."""
    cells = [f"{title} {_cell(name, row)}" for name, title in _COLUMNS.items() if name in row]
    return f"{'WRONG ' if is_wrong(row) else ''}{row['step']}: {', '.join(cells)}"


def markdown(conditions: dict[str, Any], rows: list[Row]) -> str:
    """Return the page: conditions, what went wrong, and a table for each step."""
    gpu = conditions.get("gpu", "a rehearsal on the CPU, whose times mean nothing")
    versions = [f"{name} {conditions[name]}" for name in ("torch", "triton") if name in conditions]
    lines = ["# Measured: on a GPU", "", f"{gpu}, {', '.join(versions)}, {conditions['date']}."]
    wrong = [row for row in rows if is_wrong(row)]
    failures = [f"- {row['step']}: {row['failure']}" for row in rows if "failure" in row]
    checked = sum("limit" in row for row in rows)
    lines += ["", f"{checked} results compared, {len(wrong)} wrong."]
    lines += [f"- {line(row)}" for row in wrong] + failures
    for step, title in _TITLES.items():
        chosen = [row for row in rows if row["step"] == step and "failure" not in row]
        if step == "kernels":
            chosen = _worst(chosen)
        if chosen:
            names = [name for name in _COLUMNS if any(name in row for row in chosen)]
            header = [_COLUMNS[name] for name in names]
            cells = [[_cell(name, row) for name in names] for row in chosen]
            lines += ["", f"## {title}", "", markdown_table(header, cells).rstrip()]
    return "\n".join(lines) + "\n"


def _worst(rows: list[Row]) -> list[Row]:
    """Return the least exact row of each kernel and dtype."""
    worst: dict[Any, Row] = {}
    for row in rows:
        key = row["structure"], row["road"], row["dtype"]
        if key not in worst or not row["error"] <= worst[key]["error"]:
            worst[key] = row
    return list(worst.values())


def _cell(name: str, row: Row) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    if name in ("seconds", "dense", "predicted"):
        return f"{value * 1e6:.4g}"
    if name == "size":
        return "×".join(map(str, value))
    if name == "rate":
        return f"{value / 1e12:.3g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
