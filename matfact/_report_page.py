"""Compression report as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matfact import _html
from matfact._layers import LayerReport

#: Heading and attribute of the measures that are also drawn as bars.
_MEASURES = (
    ("density", "density"),
    ("relative error", "relative_error"),
    ("normalized error", "normalized_error"),
    ("layer error", "layer_error"),
)


def page(rows: Sequence[LayerReport], lead: str, facts: Mapping[str, Any]) -> str:
    """Return the self-contained page."""
    headings = ["layer", "method", "shape", *(heading for heading, _ in _MEASURES)]
    headings += ["bits a weight", "seconds", "bytes before", "after"]
    largest = {name: _largest(rows, name) for _, name in _MEASURES}
    cells = (_cells(row, largest) for row in rows)
    return _html.page("Compression report", lead, facts, _html.table(headings, cells))


def _largest(rows: Sequence[LayerReport], name: str) -> float:
    values = [getattr(row, name) for row in rows]
    return max((value for value in values if value is not None), default=0.0)


def _cells(row: LayerReport, largest: dict[str, float]) -> list[str]:
    groups = f"×{row.groups}" if row.groups > 1 else ""
    return [
        _html.escape(row.layer),
        _html.escape(row.outcome),
        f"{row.rows}×{row.columns}{groups}",
        *(_html.measured(getattr(row, name), largest[name]) for _, name in _MEASURES),
        _html.measured(row.bits_per_weight),
        _html.measured(row.seconds),
        f"{row.dense_nbytes:,}",
        "" if row.nbytes is None else f"{row.nbytes:,}",
    ]
