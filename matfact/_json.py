"""JSON from files that are not trusted."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: bytes) -> dict[str, Any]:
    """Return the JSON object `text`.

    Raises
    ------
    ValueError
        If it is anything else, is nested beyond measure or repeats a key.
    """
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice")
    return content
