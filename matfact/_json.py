"""JSON from files that are not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from matfact._regular import read_whole

#: Longest report read, in bytes.
_LONGEST_REPORT = 1 << 26

T = TypeVar("T")


def parse_json(
    text: bytes | str, convert: Callable[[dict[str, Any]], Any] = lambda content: content
) -> dict[str, Any]:
    """Return the JSON object `text`.

    Parameters
    ----------
    text : bytes or str
        All of it.
    convert : callable, optional
        Called with each object, inner ones first; what it returns takes the object's place.

    Raises
    ------
    ValueError
        If it is anything else, is nested beyond measure, repeats a key, or holds a number that is
        not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key comes twice")
        return convert(content)

    try:
        decoded = text if isinstance(text, str) else text.decode()
        content = json.loads(
            decoded, object_pairs_hook=unique, parse_float=_finite, parse_constant=_refused
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def is_version(content: dict[str, Any], format: str, version: int) -> bool:
    """Whether `content` says that it is of this format and version; ``true`` is not 1."""
    found = content.get("version")
    return content.get("format") == format and type(found) is int and found == version


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def read_report(path: str | Path, make_row: Callable[..., T]) -> tuple[list[T], dict[str, Any]]:
    """Return the rows and the metadata of a report that was written as JSON.

    Raises
    ------
    ValueError
        If the file holds anything else.
    """
    content = read_whole(path, _LONGEST_REPORT)
    try:
        return report_rows(parse_json(content), make_row)
    except ValueError as error:
        raise ValueError(f"path must name a report by to_json, not {path}: {error}.") from None


def report_rows(content: Any, make_row: Callable[..., T]) -> tuple[list[T], dict[str, Any]]:
    """Return the rows and the metadata that a report holds, or raise ``ValueError``."""
    try:
        rows, metadata = [make_row(**row) for row in content["rows"]], content["metadata"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not those of a report ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError("metadata are no JSON object")
    return rows, metadata
