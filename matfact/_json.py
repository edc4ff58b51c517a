"""JSON from untrusted files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from matfact._regular import read_whole

#: Maximum size of a report, in bytes.
_LONGEST_REPORT = 1 << 26

#: Maximum nesting, and the brackets that measure it.
_DEEPEST = 200
_OPENING, _CLOSING = (np.frombuffer(brackets, np.uint8) for brackets in (b"[{", b"]}"))
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
#: Characters examined at a time.
_CHUNK = 1 << 16

T = TypeVar("T")


def parse_json(
    text: bytes | str, convert: Callable[[dict[str, Any]], Any] = lambda content: content
) -> dict[str, Any]:
    """Parse the JSON object `text`.

    Parameters
    ----------
    text : bytes or str
        The whole text.
    convert : callable, optional
        Called with each object, inner ones first; its result replaces the object.

    Raises
    ------
    ValueError
        If `text` is not a JSON object, is nested too deeply, repeats a key, or holds a number that
        is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key comes twice")
        return convert(content)

    try:
        decoded = text if isinstance(text, str) else text.decode()
        _check_depth(decoded)
        content = json.loads(
            decoded, object_pairs_hook=unique, parse_float=_number, parse_constant=_refused
        )
    except RecursionError:  # if the caller's stack is already deep
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _check_depth(text: str) -> None:
    """Raise ``ValueError`` if brackets are nested too deeply for Python's parser.

    The parser is recursive and can crash the process if the recursion limit has been raised.
    """
    if _depth(text) > _DEEPEST and _depth(_STRING.sub("", text)) > _DEEPEST:
        raise ValueError("nested too deeply")


def _depth(text: str) -> int:
    """Return the nesting depth of brackets, including brackets in strings."""
    level = deepest = 0
    for start in range(0, len(text), _CHUNK):
        codes = np.frombuffer(text[start : start + _CHUNK].encode("ascii", "replace"), np.uint8)
        steps = np.isin(codes, _OPENING).astype(np.int32) - np.isin(codes, _CLOSING)
        levels = level + np.cumsum(steps)
        deepest, level = max(deepest, int(levels.max())), int(levels[-1])
    return deepest


def is_version(content: dict[str, Any], format: str, newest: int) -> bool:
    """Whether `content` is of this format, in a version from 1 to `newest`; ``true`` is not 1."""
    found = content.get("version")
    return content.get("format") == format and type(found) is int and 1 <= found <= newest


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def read_report(path: str | Path, make_row: Callable[..., T]) -> tuple[list[T], dict[str, Any]]:
    """Return the rows and metadata of a report written as JSON.

    Raises
    ------
    ValueError
        If the file is not such a report.
    """
    content = read_whole(path, _LONGEST_REPORT)
    try:
        return report_rows(parse_json(content), make_row)
    except ValueError as error:
        raise ValueError(f"path must name a report by to_json, not {path}: {error}.") from None


def finite(content: Any) -> Any:
    """Return `content` with None for every infinity and NaN, which JSON lacks."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def report_rows(content: Any, make_row: Callable[..., T]) -> tuple[list[T], dict[str, Any]]:
    """Return the rows and metadata of a report, or raise ``ValueError``."""
    try:
        rows, metadata = [make_row(**row) for row in content["rows"]], content["metadata"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not those of a report ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError("metadata are no JSON object")
    return rows, metadata
