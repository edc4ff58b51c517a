"""Text from files, which may hold anything, where it is printed."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return text of which no character controls a terminal or the order of what stands beside."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
