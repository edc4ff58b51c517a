"""A compression report as a page of its own."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matfact.torch.report import CompressionReport, LayerReport

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
td svg { display: block }
rect { fill: #4477aa }
"""

#: Heading, attribute and whether it is drawn as a bar too.
_MEASURES = (
    ("density", "density", True),
    ("relative error", "relative_error", True),
    ("normalized error", "normalized_error", True),
    ("layer error", "layer_error", True),
    ("seconds", "seconds", False),
)


def page(report: CompressionReport) -> str:
    """Return the page, which needs no other file."""
    headings = ["layer", "method", "shape", *(h for h, _, _ in _MEASURES), "bytes before", "after"]
    largest = {name: _largest(report, name) for _, name, drawn in _MEASURES if drawn}
    rows = "\n".join(_row(row, largest) for row in report)
    facts = "".join(
        f"<li>{escape(str(key))}: {escape(str(value))}</li>"
        for key, value in report.metadata.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Compression report</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>
<h1>Compression report</h1>
<p>{len(report)} layers, {report.nbytes:,} of {report.dense_nbytes:,} bytes, density
{report.density:.3f}.</p><ul>{facts}</ul>
<table><thead><tr>{"".join(f"<th>{escape(h)}</th>" for h in headings)}</tr></thead>
<tbody>
{rows}
</tbody></table></html>
"""


def _largest(report: CompressionReport, name: str) -> float:
    values = [getattr(row, name) for row in report]
    return max((value for value in values if value is not None), default=0.0)


def _row(row: LayerReport, largest: dict[str, float]) -> str:
    groups = f"×{row.groups}" if row.groups > 1 else ""
    cells = [
        escape(row.layer),
        escape(row.method or row.message or row.status),
        f"{row.rows}×{row.columns}{groups}",
    ]
    for _, name, drawn in _MEASURES:
        value = getattr(row, name)
        text = "" if value is None else f"{value:.3f}"
        cells.append(text + (_bar(value, largest[name]) if drawn and value is not None else ""))
    cells += [f"{row.dense_nbytes:,}", "" if row.nbytes is None else f"{row.nbytes:,}"]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _bar(value: float, largest: float) -> str:
    """Return a bar as long as `value` is large."""
    width = 90 * value / largest if 0 < largest < float("inf") else 0
    return f'<svg width="90" height="6"><rect width="{width:.1f}" height="6"/></svg>'
