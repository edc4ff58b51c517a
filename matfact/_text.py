"""Output of untrusted names, of tables and of what to install."""

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


def extra(name: str) -> str:
    """Return how to install an extra, for errors. No registry has the package yet."""
    return f"the extra '{name}' of matfact (in a clone of it: pip install -e '.[{name}]')"


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as CSV. None is blank."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([columns, *rows])
    return buffer.getvalue()
