"""Compression report as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matfact import _html
from matfact._depth_chart import depth_chart
from matfact._html import Column, Total
from matfact._layers import LayerReport

#: Measures that are also drawn as bars, by attribute.
_MEASURES = {
    "layer_error": Column(
        "output error",
        "Error of the layer's outputs ÷ their size, on calibration inputs that were held out.",
    ),
    "fitted_layer_error": Column(
        "on fitted inputs", "The same error on the inputs of the fit; usually smaller."
    ),
    "relative_error": Column("weight error", "‖W − Ŵ‖ ÷ ‖W‖: what the weight itself has lost."),
    "normalized_error": Column(
        "÷ magnitude",
        "Weight error ÷ that of magnitude pruning with as many values. Below 1 is better.",
    ),
    "density": Column("density", "Stored values ÷ entries of the weight."),
}
_NAME = Column("layer", "Name of the layer. The largest error comes first.", "t")
_OTHERS = (
    Column("bits", "Bits in files ÷ entries of the weight, positions included."),
    Column("bytes", "Bytes in files after compression."),
    Column("of before", "Bytes after ÷ before compression."),
    Column("FLOPs", "Operations for one input ÷ those of the dense layer."),
    Column("shape", "Rows × columns of the weight as a matrix, × groups of a convolution."),
    Column("place", "Place of the layer in the network, from 1."),
    Column("seconds", "Time of the fit."),
    Column("method", "What found the factors, or why the layer is kept.", "t note"),
)


def page(rows: Sequence[LayerReport], facts: Mapping[str, Any], untouched: str) -> str:
    """Return the self-contained page.

    Parameters
    ----------
    rows : sequence of LayerReport
        The layers in the order of the network.
    facts : mapping of str to object
        Metadata of the report.
    untouched : str
        What is in no layer of the report.
    """
    done = sum(row.status == "compressed" for row in rows)
    lead = f"{done} of {len(rows)} layers are compressed."
    calibrated = any(row.layer_error is not None for row in rows)
    label = "error of outputs (else of weights)" if calibrated else "error of weights"
    largest = {name: _largest(rows, name) for name in _MEASURES}
    known = {n: most for n, most in largest.items() if any(getattr(r, n) is not None for r in rows)}
    placed = sorted(enumerate(rows, start=1), key=lambda item: _harm(item[1]), reverse=True)
    cells = [_cells(row, place, known) for place, row in placed]
    columns = (_NAME, *(_MEASURES[name] for name in known), *_OTHERS)
    return _html.page(
        "Compression report", lead, _html.totals(_totals(rows, facts)),
        depth_chart([(row.layer, row.error) for row in rows], label),
        "<h2>Layers by harm</h2>", _html.table(columns, cells, "Layers by harm"),
        _html.meanings(columns), _html.settings(_settings(facts, untouched)),
    )  # fmt: skip


def _harm(row: LayerReport) -> float:
    """Return the error to sort by; layers without one come last."""
    return -1.0 if row.error is None or math.isnan(row.error) else row.error


def _totals(rows: Sequence[LayerReport], facts: Mapping[str, Any]) -> list[Total]:
    """Return the totals over all layers, also those that are kept."""
    nbytes = sum(row.dense_nbytes if row.nbytes is None else row.nbytes for row in rows)
    flops = sum(row.dense_flops if row.flops is None else row.flops for row in rows)
    dense_nbytes, dense_flops = (
        sum(getattr(row, name) for row in rows) for name in ("dense_nbytes", "dense_flops")
    )
    entries = sum(row.entries for row in rows)
    stored = sum(row.entries * (1.0 if row.density is None else row.density) for row in rows)
    return [
        Total(
            Column("bytes", "Of the weights of these layers in files, also of those kept."),
            _html.size(nbytes), f"{_share(nbytes, dense_nbytes)} of {_html.size(dense_nbytes)}",
        ),
        Total(
            Column("FLOPs", "For one input, or one position of an image."),
            _html.scaled(flops), f"{_share(flops, dense_flops)} of {_html.scaled(dense_flops)}",
        ),
        Total(
            Column("bits a weight", "Bits of these bytes ÷ entries of the dense weights."),
            f"{8 * nbytes / max(1, entries):.2f}", f"of {8 * dense_nbytes / max(1, entries):.3g}",
        ),
        Total(
            Column("density", "Stored values ÷ entries of the dense weights."),
            f"{stored / max(1, entries):.3f}",
        ),
        *_speed(facts),
        Total(
            Column("fitting", "Time of all fits, which may have run in parallel."),
            f"{sum(row.seconds or 0.0 for row in rows):.1f} s",
        ),
    ]  # fmt: skip


def _speed(facts: Mapping[str, Any]) -> list[Total]:
    """Return the speed that measured times predict, if there are any."""
    budget = facts.get("budget")
    if not isinstance(budget, Mapping) or budget.get("cost") != "seconds":
        return []
    dense, planned = budget.get("dense"), budget.get("planned")
    if not (isinstance(dense, float) and isinstance(planned, float) and planned > 0):
        return []
    meaning = "Measured times of the layers' operators, dense ÷ chosen, each alone."
    return [Total(Column("predicted speed", meaning), f"× {dense / planned:.2f}")]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "100%"


def _settings(facts: Mapping[str, Any], untouched: str) -> dict[str, Any]:
    """Return the metadata in words."""
    known = {"method", "density", "value_bits", "budget", "steps", "untouched"}
    words: dict[str, Any] = {"method": facts.get("method")}
    if isinstance(budget := facts.get("budget"), Mapping):
        words["budget"] = (
            f"at most {_amount(budget, 'ceiling')}, planned {_amount(budget, 'planned')}; methods "
            "and densities were chosen for each layer"
        )
    elif facts.get("density") is None:
        words["density"] = "that of the method"
    else:
        words["density"] = f"{facts['density']} of the entries of each layer"
    if facts.get("value_bits") is not None:
        words["values"] = f"quantized to {facts['value_bits']} bits"
    words["also done"] = facts.get("steps") or "nothing"
    words["in no layer"] = untouched or "nothing"
    return words | {key: value for key, value in facts.items() if key not in known}


def _amount(budget: Mapping[str, Any], name: str) -> str:
    """Return a cost of a budget with its unit."""
    value, cost = budget.get(name), str(budget.get("cost"))
    unit = {"nbytes": "bytes", "flops": "FLOPs"}.get(cost, cost)
    return f"{value:,.6g} {unit}" if isinstance(value, (int, float)) else f"{value} {unit}"


def _largest(rows: Sequence[LayerReport], name: str) -> float:
    values = [getattr(row, name) for row in rows]
    return max((v for v in values if v is not None and math.isfinite(v)), default=0.0)


def _cells(row: LayerReport, place: int, largest: Mapping[str, float]) -> list[str]:
    groups = f"×{row.groups}" if row.groups > 1 else ""
    return [
        _html.escape(row.layer),
        *(_html.measured(getattr(row, name), most) for name, most in largest.items()),
        _html.measured(row.bits_per_weight),
        f"{row.dense_nbytes if row.nbytes is None else row.nbytes:,}",
        "" if row.nbytes is None else _share(row.nbytes, row.dense_nbytes),
        "" if row.flops is None else _share(row.flops, row.dense_flops),
        f"{row.rows}×{row.columns}{groups}",
        str(place),
        _html.measured(row.seconds, digits=2),
        _html.escape(_outcome(row)),
    ]


def _outcome(row: LayerReport) -> str:
    """Return the method with its remark, or why the layer is kept."""
    return f"{row.method}: {row.message}" if row.method and row.message else row.outcome
