"""Results as JSON, a Markdown table and a figure."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import figures
from benchmarks.tables import markdown_table
from matfact._figures import marked

_console = Console(highlight=False)
_EXACT = 1e-6  #: relative errors below are shown as such: normalized ones say little there


def print_conditions(conditions: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the conditions of the measurement."""
    for name, value in {**conditions, "options": vars(options)}.items():
        _console.print(f"{name}: {value}", markup=False, soft_wrap=True)


def print_row(row: dict[str, Any]) -> None:
    """Print a finished fit."""
    shape = "×".join(map(str, row["shape"]))
    head = f"{row['matrix']} ({shape} {row['dtype']}) {row['method']}:"
    _console.print(head, _cell([row]) or "", row["message"], markup=False, soft_wrap=True)


def write(
    options: argparse.Namespace,
    conditions: dict[str, Any],
    absent: list[str],
    rows: list[dict[str, Any]],
    curves: list[dict[str, Any]],
) -> None:
    """Write ``projection.json``, ``projection.md`` and, where there are curves, the figure."""
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "conditions": conditions,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "absent": absent,
        "rows": rows,
        "curves": curves,
    }
    target = options.output / "projection"
    target.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str))
    table = markdown(options, conditions, absent, rows) + speedups(curves)
    target.with_suffix(".md").write_text(table)
    if curves:
        figures.save(lambda: draw(curves), target.with_suffix(".svg"))
    _console.print(f"Written to {options.output}", markup=False)


def markdown(
    options: argparse.Namespace,
    conditions: dict[str, Any],
    absent: list[str],
    rows: list[dict[str, Any]],
) -> str:
    """Return one table for each family of methods."""
    peers = {k: v for k, v in conditions["peers"].items() if v}
    versions = ", ".join(f"{k} {v}" for k, v in {**conditions["versions"], **peers}.items())
    lines = [
        f"Density {options.density:g}, seed {options.seed}, {conditions['cpu']}, "
        f"{options.threads} thread(s), median of {options.repeats} interleaved repeat(s) "
        f"(one where a fit takes over {options.slow:g} s). {versions}.",
        "",
        "Error ÷ that of magnitude pruning with as many stored values (the relative error, "
        "marked =, where it is below a millionth) · density · seconds.",
    ]
    if absent:
        lines += ["", f"Not installed: {', '.join(absent)}."]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += ["", f"### {family.capitalize()}", ""]
        lines.append(_table([row for row in rows if row["family"] == family]).rstrip())
    notes = {f"{r['method']} on {r['matrix']}: {r['message']}" for r in rows if r["message"]}
    lines += ["", *(f"- {note}" for note in sorted(notes))]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    # Random matrices and transforms have a line each; those of a model are averaged by shape.
    labels = [r["matrix"] if _is_single(r) else r["group"] for r in rows]
    lines = []
    for label in dict.fromkeys(labels):
        chosen = [row for row, name in zip(rows, labels, strict=True) if name == label]
        count = len({row["matrix"] for row in chosen})
        cells = [_cell([r for r in chosen if r["method"] == method]) for method in methods]
        head = label if count == 1 else f"{label} (mean of {count})"
        lines.append((head, *(cell or "–" for cell in cells)))
    return markdown_table(("matrix", *methods), lines)


def _is_single(row: dict[str, Any]) -> bool:
    return row["group"].startswith(("synthetic", "transform"))


def _cell(rows: list[dict[str, Any]]) -> str:
    """Return error, density and seconds, averaged over rows; or why there are none."""
    if not rows:
        return ""
    ok = [row for row in rows if row["status"] == "ok"]
    if len(ok) < len(rows):
        return ", ".join(sorted({row["status"] for row in rows}))
    relative, density, seconds = (
        statistics.fmean(row[name] for row in ok)
        for name in ("relative_error", "density", "median_seconds")
    )
    normalized = [row["normalized_error"] for row in ok]
    if relative < _EXACT or None in normalized:
        error = f"= {relative:.1e}"
    else:
        error = f"{statistics.fmean(normalized):.3f}"
    return f"{error} · {density:.3g} · {seconds:.3g} s"


def speedups(curves: list[dict[str, Any]], reference: str = "published DSF") -> str:
    """Return the time at which other methods reach the final error of the reference."""
    lines = []
    for curve in curves:
        ok = [row for row in curve["rows"] if row["status"] == "ok"]
        goals = [r for r in ok if r["method"] == reference and r["setting"] == {"outer": 40}]
        for goal in goals:
            for method in dict.fromkeys(r["method"] for r in ok if r["method"] != reference):
                good = [
                    row["median_seconds"]
                    for row in ok
                    if row["method"] == method and row["relative_error"] <= goal["relative_error"]
                ]
                time = f"{min(good):.3g} s" if good else "no time measured"
                lines.append(
                    f"- {curve['matrix']}: {method} reaches the {goal['relative_error']:.4f} of "
                    f"{reference} ({goal['median_seconds']:.3g} s) in {time}."
                )
    head = ["", "### Time to the error of the published code", ""]
    return "\n".join([*head, *lines, ""]) if lines else ""


def draw(curves: list[dict[str, Any]]) -> Figure:
    """Draw error against seconds.

    Markers are finished fits with increasing iterations. Thin lines are the progress of one fit
    with default settings; its annealing makes early errors larger.
    """
    methods = list(dict.fromkeys(row["method"] for curve in curves for row in curve["rows"]))
    looks = {method: marked(i) for i, method in enumerate(methods)}
    figure = Figure(figsize=(6.0 * len(curves), 4.4), layout="constrained", dpi=200)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for curve, axes in zip(curves, panels, strict=True):
        for method in methods:
            rows = [r for r in curve["rows"] if r["method"] == method and r["status"] == "ok"]
            points = sorted((r["median_seconds"], r["relative_error"]) for r in rows)
            if points:
                axes.plot(*zip(*points, strict=True), "--", **looks[method], label=method)
            if curve["traces"].get(method):
                trace = zip(*curve["traces"][method], strict=True)
                color = looks[method]["color"]
                axes.plot(*trace, color=color, marker="", linewidth=1, alpha=0.6)
        axes.set(xscale="log", xlabel="seconds", ylabel="relative error", title=curve["matrix"])
        figures.label_lines(axes)
    return figure
