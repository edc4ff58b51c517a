"""Write the tables of the documentation from the data files in ``docs/data/``.

In a page, a table stands between ``<!-- table NAME from data/FILE.json -->`` and
``<!-- end of table -->``. A data file has sets of rows and tables that show them::

    {"sets": {"SET": {"measured": {"date": ..., "machine": ...}, "rows": [{"bits": 2.5}, ...]}},
     "tables": {"NAME": {"set": "SET", "where": {"bits": [2.5, 4]}, "line": ["method"],
                         "columns": {"HEADER": {"cell": "{error:.3f}", "where": {...}}}}}}

``where`` selects rows. A cell is a format string, with a factor for another unit as in
``{seconds * 1e6:.4g}``, or a list of them; a part whose number is missing is left out. Each row is
a line, or with ``line`` all rows that agree in these fields are: a column then shows the first row
that fits its own ``where``. A column without ``where`` may be just a cell.
"""

from __future__ import annotations

import argparse
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import summary
from benchmarks.datafiles import PageError, fits, read, save, take
from benchmarks.tables import markdown_table

ROOT = Path(__file__).parents[1]
START = re.compile(r"^( *)<!-- table (\S+) from data/(\S+)\.json -->$")
END = "<!-- end of table -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--check", action="store_true", help="only say which pages are not up to date")
    add("--take", type=Path, metavar="RESULTS", help="first take rows from a benchmark's JSON file")
    add("--into", metavar="FILE:SET", help="where to: bits:matrices is that set of bits.json")


def run(options: argparse.Namespace) -> int:
    if (options.take is None) != (options.into is None):
        raise SystemExit("--take and --into go together.")
    try:
        if options.take:
            take(options.take, ROOT / "docs" / "data", options.into)
        stale = list(update(ROOT, write=not options.check))
    except PageError as error:
        raise SystemExit(str(error)) from None
    for path in stale:
        print(f"{path.relative_to(ROOT)} is {'not up to date' if options.check else 'written'}")
    return int(options.check and bool(stale))


def update(root: Path, *, write: bool) -> Iterator[Path]:
    """Yield the pages that differ from the data files, and write them; first the summary."""
    target = root / "docs" / "data" / "networks.json"
    if target.is_file() and read(target) != (content := summary.networks(target.parent)):
        if write:
            save(target, content)
        yield target
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        rendered = render(text, root / "docs" / "data", str(page.relative_to(root)))
        if rendered != text:
            if write:
                page.write_text(rendered, encoding="utf-8")
            yield page


def pages(root: Path) -> list[Path]:
    """Return the pages that may have tables."""
    found = (root / "docs").rglob("*.md")
    return [root / "README.md", *sorted(p for p in found if "generated" not in p.parts)]


def render(text: str, data: Path, page: str) -> str:
    """Return a page with its tables written anew."""
    out: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        out.append(line)
        if not (match := START.match(line)):
            continue
        if not any(after.strip() == END for after in lines):
            raise PageError(f"{page}: no '{END}' follows '{line.strip()}'.")
        indent, name, file = match.groups()
        table = load(data / f"{file}.json", name, page)
        out += ["", *(indent + row for row in table.splitlines()), "", indent + END]
    return "\n".join(out)


def load(path: Path, name: str, page: str) -> str:
    """Return a table of a data file as Markdown."""
    if not path.is_file():
        raise PageError(f"{page}: there is no docs/data/{path.name}.")
    content = read(path)
    if name not in content["tables"]:
        known = ", ".join(content["tables"])
        raise PageError(f"{page}: no table '{name}' in docs/data/{path.name}; it has {known}.")
    table = content["tables"][name]
    if table["set"] not in content["sets"]:
        raise PageError(f"docs/data/{path.name}: table '{name}' shows no set of the file.")
    return shown(table, content["sets"][table["set"]]["rows"])


def shown(table: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    rows = [row for row in rows if fits(row, table.get("where", {}))]
    lines: dict[Any, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        line = tuple(map(row.get, table["line"])) if "line" in table else number
        lines.setdefault(line, []).append(row)
    columns = {
        header: column if isinstance(column, dict) else {"cell": column}
        for header, column in table["columns"].items()
    }
    body = [[_cell(group, **column) for column in columns.values()] for group in lines.values()]
    return markdown_table(list(columns), body)


def _cell(rows: list[dict[str, Any]], cell: Any, where: dict[str, Any] | None = None) -> str:
    """Return the parts of a cell of which every number is known."""
    row = next((row for row in rows if fits(row, where or {})), {})
    text = ""
    for part in [cell] if isinstance(cell, str) else cell:
        fields = [field.partition(" * ")[0] for _, field, _, _ in _FORMATTER.parse(part) if field]
        if all(row.get(field) is not None for field in fields):
            text += _FORMATTER.vformat(part, (), row)
    return text or "–"


class _Formatter(string.Formatter):
    """Formats numbers in another unit, as in ``{seconds * 1e6:.4g} µs``."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Return a field of the row, times the factor."""
        name, _, factor = field_name.partition(" * ")
        return kwargs[name] * float(factor) if factor else kwargs[name], name


_FORMATTER = _Formatter()
