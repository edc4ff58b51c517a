"""Calibration with few samples: six networks, measured on fresh inputs.

Each network is compressed by double sparse factorization with default options, without feedback,
and without calibration, and by ADMM with the same samples. One measure per network is chosen in
advance: the Kullback–Leibler divergence of predictions (in nats), 1 − cosine of embeddings, or the
relative error of the output. Real texts are ``text/*.txt`` in the folder of data sets; the quick
form trains three tiny networks on what is installed.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from benchmarks import study
from benchmarks.harness import Row
from benchmarks.networks import fresh
from benchmarks.networks.subjects import KINDS, subject
from benchmarks.tables import markdown_table
from matfact import DoubleSparseFactorizer
from matfact.torch import CompressionWarning, compress

SEEDS = 1
DENSITIES = (0.5, 0.3)
#: Calibration samples, and samples per batch.
SAMPLES = {16: 4, 64: 8, 256: 16}
DEFAULT, UNCALIBRATED = "DSF", "DSF, uncalibrated"
CALIBRATED = {DEFAULT: True, "DSF, no feedback": False, "ADMM": True}
#: Maximum ratio of the default to the best other method, and maximum deviation of reported errors
#: from errors on fresh inputs.
WORSE, ERROR = 1.02, 0.15


class Ratio(NamedTuple):
    """A ratio of measures on the same inputs, with its standard error (jackknife over batches)."""

    value: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether it is more than what is allowed."""
        return self.value > WORSE

    def __str__(self) -> str:
        text = f"{self.value:.3f} ± {self.error:.3f}"
        return f"**{text}**" if self.is_worse else text


def run(quick: bool, folder: Path, cells: str = "") -> int:
    """Run the unfinished cells, and write the table."""
    return study.execute(STUDY, "calibration", folder, quick=quick, pattern=cells)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield each network with each number of samples, density and method."""
    for name, kind in KINDS.items():
        options = kind.quick if quick else kind.full
        if options is None:
            continue
        # The recipe is part of the cell's key.
        common = {"network": name, "form": "quick" if quick else "full", "recipe": str(options),
                  "sweeps": 10 if quick else kind.sweeps}  # fmt: skip
        for density in (0.5,) if quick else DENSITIES:
            yield {**common, "samples": 0, "density": density, "method": UNCALIBRATED}
            for samples, size in {16: 4}.items() if quick else SAMPLES.items():
                for method in CALIBRATED:
                    yield {**common, "samples": samples, "size": size, "density": density,
                           "method": method}  # fmt: skip


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a compressed network and its layers on fresh inputs."""
    dense = subject(cell["network"], cell["form"] == "quick")
    calibration = None
    if cell["samples"]:
        calibration = dense.calibration(cell["samples"], cell["size"], cell["seed"])
    method: Any = DoubleSparseFactorizer(max_iter=cell["sweeps"])
    feedback = CALIBRATED.get(cell["method"], False)
    torch.manual_seed(cell["seed"])
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)  # what is kept is counted below
        small, report = compress(
            dense.model, "admm" if cell["method"] == "ADMM" else method, density=cell["density"],
            layers=dense.layers, calibration=calibration, feedback=feedback,
        )  # fmt: skip
    seconds = time.process_time() - start
    names = [row.layer for row in report if row.status == "compressed"]
    found = fresh.measure(dense, small, names, paired=feedback)
    layers = {
        row.layer: {"reported": row.layer_error, "fresh": found.layers[row.layer]}
        for row in report if row.layer in found.layers and calibration is not None
    }  # fmt: skip
    name = KINDS[cell["network"]].headline
    return {
        **found.outputs,
        "parts": {str(i): part[name] for i, part in enumerate(found.parts)},
        "seconds": seconds,
        "compressed": len(names),
        "kept": len(report) - len(names),
        "density stored": report.density,
        "dtype": str(next(dense.model.parameters()).dtype),
        "shapes": _shapes(report),
        "layers": layers,
    }


def _shapes(report: Any) -> str:
    """Return the shapes of the compressed matrices with their counts."""
    shapes = [f"{row.rows}×{row.columns}" for row in report if row.status == "compressed"]
    return ", ".join(f"{shapes.count(shape)} of {shape}" for shape in dict.fromkeys(shapes))


def table(rows: list[Row]) -> str:
    """Return a comparison of methods by cell, and of reported errors."""
    return "\n".join((_verdict(rows), _comparison(rows), _errors(rows), _networks(rows)))


def groups(rows: list[Row]) -> dict[tuple[str, int, float], dict[str, Row]]:
    """Return the methods of each network, number of samples and density, where all have run."""
    found: dict[tuple[str, int, float], dict[str, Row]] = {}
    alone = {(row["network"], row["density"]): row for row in rows if not row["samples"]}
    for row in rows:
        if row["samples"]:
            key = row["network"], row["samples"], row["density"]
            found.setdefault(key, {})[row["method"]] = row
    whole = {key: by for key, by in found.items() if len(by) == len(CALIBRATED)}
    return {
        key: {**by, UNCALIBRATED: alone[key[0], key[2]]}
        for key, by in whole.items() if (key[0], key[2]) in alone
    }  # fmt: skip


def headline(row: Row) -> float:
    """Return the measure by which methods are judged on the network of a row."""
    return float(row[KINDS[row["network"]].headline].mean)


def ratio(by_method: dict[str, Row]) -> Ratio:
    """Return the default's measure ÷ the best of the others."""
    default = by_method[DEFAULT]
    other = min((row for name, row in by_method.items() if name != DEFAULT), key=headline)
    pairs = [
        (a.mean, b.mean)
        for a, b in zip(default["parts"].values(), other["parts"].values(), strict=True)
    ]
    n, tops, bottoms = len(pairs), *(sum(column) for column in zip(*pairs, strict=True))
    without = [(tops - a) / (bottoms - b) for a, b in pairs] if n > 1 else [math.nan]
    error = math.sqrt((n - 1) * statistics.pvariance(without))
    return Ratio(headline(default) / headline(other), error)


def layer_ratios(row: Row) -> list[float]:
    """Return reported errors ÷ those on fresh inputs, one a layer; NaN where none is known."""
    pairs = [(p.get("reported"), p.get("fresh")) for p in (row.get("layers") or {}).values()]
    return [p.mean / q.mean if p and q and q.mean > 0 else math.nan for p, q in pairs]


def _verdict(rows: list[Row]) -> str:
    found = groups(rows)
    near = [abs(r - 1) <= ERROR for by in found.values() for r in layer_ratios(by[DEFAULT])]
    ratios = [ratio(by) for by in found.values()]
    worse = [r for r in ratios if r.is_worse]
    clearly = sum(r.value - 2 * r.error > WORSE for r in worse)
    share = f"{sum(near) / len(near):.1%}" if near else "none"
    return (
        f"Default at most {WORSE - 1:.0%} worse than the best of the others:"
        f" {len(found) - len(worse)} of {len(found)} cells; of the others, {clearly} by more than"
        f" two standard errors of the fresh inputs. Reported error of a layer within {ERROR:.0%} of"
        f" that on fresh inputs, default: {share} of {len(near)} layers.\n"
    )


def _comparison(rows: list[Row]) -> str:
    methods = (*CALIBRATED, UNCALIBRATED)
    header = ("network", "measure", "density", "samples", *methods, "DSF ÷ best other",
              "output error: DSF", "CPU s: DSF")  # fmt: skip
    lines = []
    for (network, samples, density), by in groups(rows).items():
        lines.append((
            network, KINDS[network].headline, f"{density:.0%}", samples,
            *(f"{headline(by[m]):.4g}" for m in methods),
            str(ratio(by)),
            f"{by[DEFAULT]['output error'].mean:.4f}", f"{by[DEFAULT]['seconds'].mean:.0f}",
        ))  # fmt: skip
    return markdown_table(header, lines)


def _errors(rows: list[Row]) -> str:
    """Return how reported errors of layers compare with those on fresh inputs."""
    header = ("network", "samples", "method", "layers", f"within {ERROR:.0%}",
              "reported ÷ fresh: median", "lowest", "highest")  # fmt: skip
    pooled: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["samples"]:
            key = row["network"], row["samples"], row["method"]
            pooled.setdefault(key, []).extend(layer_ratios(row))
    lines = []
    for key, ratios in pooled.items():
        known = [r for r in ratios if not math.isnan(r)]
        near = sum(abs(r - 1) <= ERROR for r in known) / max(1, len(ratios))
        ends = (statistics.median(known), min(known), max(known)) if known else (math.nan,) * 3
        lines.append((*key, len(ratios), f"{near:.0%}", *(f"{end:.2f}" for end in ends)))
    return markdown_table(header, lines)


def _networks(rows: list[Row]) -> str:
    """Return what each network is, and what it does when dense."""
    header = ("network", "recipe", "DSF sweeps", "type", "compressed matrices", "dense accuracy")
    first = {row["network"]: row for row in reversed(rows)}
    lines = []
    for name, row in reversed(first.items()):
        known = row.get("dense accuracy")
        accuracy = f"{known.mean:.1%}" if known else "–"
        recipe = row["recipe"].strip("{}").replace("'", "")
        lines.append((name, recipe, row["sweeps"], row["dtype"], row["shapes"], accuracy))
    return markdown_table(header, lines)


def figure(rows: list[Row]) -> Figure:
    """Draw the default's measure ÷ the best of the others against the number of samples."""
    drawn = Figure(figsize=(6, 3.6), layout="constrained", dpi=150)
    axes = drawn.subplots()
    found = groups(rows)
    for network, density in dict.fromkeys((key[0], key[2]) for key in found):
        points = sorted(
            (k[1], ratio(by)) for k, by in found.items() if k[::2] == (network, density)
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{network}, {density:.0%}")
    axes.axhline(WORSE, color="black", linewidth=0.8)
    axes.set(xlabel="calibration samples", ylabel="DSF ÷ best other", xscale="log")
    drawn.legend(frameon=False, loc="outside right upper", fontsize="small")
    return drawn


STUDY = SimpleNamespace(SEEDS=SEEDS, cells=cells, run=measure, table=table, figure=figure)
