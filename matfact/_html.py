"""Self-contained HTML reports: one file, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matfact._text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
td svg { display: block; margin-left: auto }
rect { fill: #4477aa }
img { max-width: 100%; height: auto }
"""


def escape(text: object) -> str:
    """Escape text for HTML."""
    return html.escape(printable(text))


def page(title: str, lead: str, facts: Mapping[str, Any], *parts: str) -> str:
    """Return a page with a heading, a sentence, a list of facts and `parts` (HTML)."""
    items = "".join(f"<li>{escape(k)}: {escape(v)}</li>" for k, v in facts.items())
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p><ul>{items}</ul>
{body}
</html>
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Cells are HTML, headings are text."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def measured(value: float | None, largest: float = 0.0) -> str:
    """Return a number with a bar for its share of `largest`, if that is positive."""
    if value is None:
        return ""
    if not 0.0 < largest < float("inf"):
        return f"{value:.3f}"
    width = 90 * min(value / largest, 1.0)
    return f'{value:.3f}<svg width="90" height="6"><rect width="{width:.1f}" height="6"/></svg>'


def picture(figure: Figure, description: str) -> str:
    """Return a figure as an image embedded in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
