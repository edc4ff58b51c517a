"""Text that is printed or written: names from files, which may hold anything, and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable


def printable(text: object) -> str:
    """Return text of which no character controls a terminal or the order of what stands beside."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as CSV, blank where there is None."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([columns, *rows])
    return buffer.getvalue()
