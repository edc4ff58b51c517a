"""Whole networks at equal bytes: factorizations with quantized values against quantization alone.

The linear layers of the sentence encoder (the extra ``demo``) and of the first blocks of
SmolLM2-135M take the same number of bits a weight by every method, calibrated with the same
samples, and the networks are measured on others. Real texts are ``text/*.txt`` in the folder of
data sets; the quick form takes two layers of the encoder.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure
from sklearn.base import clone
from torch import nn

from benchmarks import generate, machine, study
from benchmarks.figures import label_lines
from benchmarks.harness import Row
from benchmarks.networks import fresh, models
from benchmarks.networks.subjects import Subject, sentence_encoder, subject
from benchmarks.tables import markdown_table
from matfact import (
    GPTQ,
    ADMMPruner,
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    RoundToNearest,
)
from matfact.compare._weights import demo_folder
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._at_bits import fit_at_bits
from matfact.torch import CompressionWarning, compress

SEEDS = 1
BITS = (2.5, 4.0, 3.0, 3.5, 2.0, 8.0)
NETWORKS = {"sentence encoder": "1 − cosine", "language model": "divergence"}
METHODS: dict[str, BaseFactorizer] = {
    "RTN": RoundToNearest(),
    "GPTQ": GPTQ(),
    "DSF": DoubleSparseFactorizer(max_iter=50),
    "DBF": DoubleBinaryFactorizer(max_iter=100),
    "ADMM": ADMMPruner(),
}
#: What has the same bits in all linear layers, those of the output too: what torch offers, and
#: weights rounded to 8 bits with scales, in the network that ``generate`` times.
WHOLE = {
    "bfloat16": 16.0, "dynamic int8": 8.0, "dynamic int8, channels": 8.0, "RTN, all layers": 8.25,
}  # fmt: skip
#: Names in ``generate``.
SHORT = {"sentence encoder": "encoder", "language model": "smollm2"}
#: Calibration samples, and those of a batch.
SAMPLES, SIZE = 256, 16


def run(quick: bool, folder: Path, cells: str = "") -> int:
    """Run the unfinished cells, and write the table."""
    if quick and (demo_folder() is None or not machine.is_installed("transformers")):
        print("transformers or the extra demo is not installed: nothing to run.")
        return 0
    return study.execute(STUDY, "bits", folder, quick=quick, pattern=cells)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the cells, budget after budget."""
    for bits in BITS[:1] if quick else BITS:
        for network in list(NETWORKS)[: 1 if quick else None]:
            for method in METHODS:
                yield {"network": network, "bits": bits, "method": method, "quick": quick,
                       "samples": 32 if quick else SAMPLES}  # fmt: skip
    for network in list(NETWORKS)[: 1 if quick else None]:
        for method, bits in WHOLE.items():
            yield {"network": network, "bits": bits, "method": method, "quick": quick, "samples": 0}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compress a network, and measure it on fresh inputs."""
    is_quick = cell["quick"]
    dense = sentence_encoder(16, "excerpts") if is_quick else subject(cell["network"], False)
    if cell["method"] in WHOLE:
        return measure_whole(cell, dense)
    layers = r"encoder\.layer\.0\.attention\.self\.(key|query)" if cell["quick"] else dense.layers
    start = time.process_time()
    overrides = at_bits(METHODS[cell["method"]], dense.model, layers, cell["bits"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)  # what is kept is counted below
        small, report = compress(
            dense.model, METHODS[cell["method"]], layers=layers, overrides=overrides,
            calibration=dense.calibration(cell["samples"], SIZE, cell["seed"]),
        )  # fmt: skip
    seconds = time.process_time() - start
    rows = [row for row in report if row.status == "compressed"]
    return {
        **fresh.measure(dense, small, [], paired=False).outputs,
        "seconds": seconds,
        "compressed": len(rows),
        "kept": len(report) - len(rows),
        "stored": 8 * sum(row.nbytes for row in rows) / sum(row.dense_flops // 2 for row in rows),
        "flops": sum(row.flops for row in rows) / sum(row.dense_flops for row in rows),
    }


def measure_whole(cell: dict[str, Any], dense: Subject) -> dict[str, Any]:
    """Measure a network whose linear layers all have the same bits, which takes no time to make."""
    if cell["method"].startswith("RTN"):
        form = f"rounded 8 bits{generate.OUTPUT}"
        small = generate.built(SHORT[cell["network"]], dense.model, form)
    else:
        small = models.of_torch(dense.model, cell["method"].removeprefix("dynamic "))
    return {
        **fresh.measure(dense, small, [], paired=False).outputs,
        "seconds": 0.0,
        "compressed": sum(isinstance(each, nn.Linear) for each in dense.model.modules()),
        "kept": 0,
        "stored": cell["bits"], "flops": 1.0,
    }  # fmt: skip


def at_bits(
    method: BaseFactorizer, model: nn.Module, layers: Any, bits: float
) -> dict[str, BaseFactorizer]:
    """Return a factorizer for each layer that takes the bits: for each shape, what suits the first.

    Which density and how many bits of a value suit a shape is found without inputs.
    """
    found: dict[tuple[int, ...], BaseFactorizer] = {}
    chosen: dict[str, BaseFactorizer] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.search(layers, name):
            W = layer.weight.detach().numpy()
            if W.shape not in found:
                found[W.shape] = fit_at_bits(method, W, bits)
            chosen[name] = clone(found[W.shape])
    return chosen


def table(rows: list[Row]) -> str:
    """Return a line for each network, budget and method."""
    header = (
        "network", "bits", "method", "measure", "value", "output error", "stored",
        "FLOPs ÷ dense", "compressed", "kept", "CPU s",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["network"], row["bits"], _value(row)))
    lines = [
        (row["network"], f"{row['bits']:g}", row["method"], NETWORKS[row["network"]],
         f"{_value(row):.4g}", f"{row['output error'].mean:.4f}", f"{row['stored'].mean:.3f}",
         f"{row['flops'].mean:.2f}", f"{row['compressed'].mean:g}", f"{row['kept'].mean:g}",
         f"{row['seconds'].mean:.0f}")
        for row in ordered
    ]  # fmt: skip
    return markdown_table(header, lines)


def _value(row: Row) -> float:
    return float(row[NETWORKS[row["network"]]].mean)


def figure(rows: list[Row]) -> Figure:
    """Draw the measure against the bits, a panel for each network."""
    drawn = Figure(figsize=(8.4, 3.6), layout="constrained", dpi=150)
    for axes, (network, name) in zip(drawn.subplots(1, 2), NETWORKS.items(), strict=True):
        for method in METHODS:
            chosen = [row for row in rows if (row["network"], row["method"]) == (network, method)]
            points = sorted((row["stored"].mean, _value(row)) for row in chosen)
            if points:
                axes.plot(*zip(*points, strict=True), label=method)
        axes.set(title=network, xlabel="bits a weight", ylabel=name, yscale="log")
        label_lines(axes)
    return drawn


STUDY = SimpleNamespace(SEEDS=SEEDS, cells=cells, run=measure, table=table, figure=figure)
