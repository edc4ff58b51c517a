"""Output of untrusted names and of tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable


def printable(text: object) -> str:
    """Replace characters that control a terminal or the direction of text."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as CSV. None is blank."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([columns, *rows])
    return buffer.getvalue()
