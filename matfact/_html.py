"""Self-contained HTML reports in one style: one file, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from matfact._text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Nothing is fetched or run, whatever a page may contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --faint: #57606a; --line: #d5dae0;
  --panel: #f5f7f9; --bar: #4477aa; --c0: #0072b2; --c1: #c04a00; --c2: #00805d; --c3: #b4558f;
  --c4: #a06e00; --c5: #2c8fc9; --c6: #4d4d4d; --c7: #8c6d1f }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e6e9ec; --faint: #9da7b1;
  --line: #363d45; --panel: #1d2126; --bar: #6699cc; --c0: #5aa9e6; --c1: #f0803c; --c2: #2fbf93;
  --c3: #df93c3; --c4: #e69f00; --c5: #8fd0f5; --c6: #bdbdbd; --c7: #cfae5b } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem;
  padding: 0 1rem; color: var(--text); background: var(--back) }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p { margin: .3rem 0 .8rem; color: var(--faint) }
.totals { display: grid; gap: .6rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)) }
.totals div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem }
.totals dt, .totals small { color: var(--faint); font-size: .85rem; display: block }
.totals dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums }
.totals small { font-weight: 400 }
.words { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem;
  margin: .5rem 0 } .words dt { color: var(--faint) }
.words dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap } tbody tr:last-child td { border-bottom: 0 }
th { background: var(--panel); font-weight: 600; vertical-align: bottom }
.t { text-align: left } .note { white-space: normal; min-width: 20rem }
@media (max-width: 40rem) { th, td { padding: .25rem .4rem } }
abbr { text-decoration: underline dotted; text-underline-offset: .2em; cursor: help }
td svg { display: block; margin-left: auto } rect { fill: var(--bar) }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--faint) }
img { min-width: 40rem; width: 100%; height: auto; display: block; background: #fff }
.chart { min-width: 44rem; width: 100%; display: block; font-size: 12px }
.chart text { fill: var(--faint) } .legend { color: var(--faint) }
.chart .grid { stroke: var(--line) }
.chart polyline { fill: none; stroke-width: 1.2; opacity: .55 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none;
  font-size: .85rem; overflow-wrap: anywhere } .legend svg { vertical-align: -2px }
"""


class Column(NamedTuple):
    """A column of a table, or a total.

    Attributes
    ----------
    text : str
        Its heading.
    meaning : str
        Shown while the pointer is on it, and in a list below.
    kind : {"", "t", "t note"}
        Text is aligned to the left, and only notes wrap.
    """

    text: str
    meaning: str
    kind: str = ""


class Total(NamedTuple):
    """A number at the top of a page, with a remark such as its share."""

    column: Column
    value: str
    remark: str = ""


def escape(text: object) -> str:
    """Escape text for HTML."""
    return html.escape(printable(text))


def page(title: str, lead: str, *parts: str) -> str:
    """Return a page with a heading, a sentence and `parts` (HTML)."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
{body}
</html>
"""


def totals(items: Iterable[Total]) -> str:
    """Return the numbers that matter most."""
    cards = (
        f"<div><dt>{_explained(column)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(remark)}</small>" if remark else "")
        + "</dd></div>"
        for column, value, remark in items
    )
    return f'<dl class="totals">{"".join(cards)}</dl>'


def settings(facts: Mapping[str, Any]) -> str:
    """Return what was asked for, in words."""
    items = (
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(in_words(value))}</dd>"
        for key, value in ((str(key), value) for key, value in facts.items())
    )
    return f'<h2>Settings</h2><dl class="words">{"".join(items)}</dl>'


def in_words(value: Any) -> str:
    """Return a value of a report's metadata as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {in_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value)) or "none"
    return str(value)


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], name: str = "Table") -> str:
    """Return a table, in a box of its own that scrolls. Cells are HTML."""
    head = "".join(f"<th{_class(column)}>{_explained(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_class(c)}>{cell}</td>" for c, cell in zip(columns, cells, strict=True))
        + "</tr>"
        for cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def meanings(columns: Iterable[Column]) -> str:
    """Return a list of the meanings, for screens without a pointer."""
    items = (f"<dt>{escape(c.text)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns)
    return (
        "<details><summary>What the columns mean</summary>"
        f'<dl class="words">{"".join(items)}</dl></details>'
    )


def measured(value: float | None, largest: float = 0.0, digits: int = 3) -> str:
    """Return a number with a bar for its share of `largest`, if that is positive."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    if not 0.0 < largest < math.inf or not math.isfinite(value):
        return text
    width = 90 * min(max(value, 0.0) / largest, 1.0)
    bar = f'<rect width="{width:.1f}" height="6"/>'
    return f'{text}<svg width="90" height="6" aria-hidden="true">{bar}</svg>'


def size(nbytes: float) -> str:
    """Return a number of bytes in a unit that people read."""
    return scaled(nbytes, "B")


def scaled(number: float, unit: str = "") -> str:
    """Return a number to three digits, in thousands, millions and so on."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = 0 if not prefix else max(0, 3 - len(str(int(abs(number)))))
    return f"{number:.{digits}f} {prefix}{unit}".strip()


def picture(figure: Figure, description: str) -> str:
    """Return a figure as an image embedded in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll">{image}</div>'


def _explained(column: Column) -> str:
    return f'<abbr title="{escape(column.meaning)}">{escape(column.text)}</abbr>'


def _class(column: Column) -> str:
    return f' class="{column.kind}"' if column.kind else ""
