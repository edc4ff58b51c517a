"""Markdown tables for the pages of ``docs/``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    head, *body = (f"| {' | '.join(map(str, line))} |" for line in (header, *lines))
    return "\n".join([head, "|" + "---|" * len(header), *body]) + "\n"
