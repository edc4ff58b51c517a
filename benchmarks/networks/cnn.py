"""Compress image classifiers by many methods, without and with fine-tuning.

Follows Boža & Macko 2025, Table 3: the same density in every layer except the first and the last,
the same training on fixed supports for every method, and accuracy on held-out images before and
after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import study
from benchmarks.harness import Row, Spread
from benchmarks.networks import data, training
from benchmarks.tables import markdown_table
from matfact.torch import (
    compress,
    compress_gradually,
    count_flops,
    prunable_parameters,
    reestimate_batch_norm,
    tucker_svd,
)

SEEDS = 3
NETWORKS = (
    ("resnet20", "fashion-mnist"), ("vgg", "fashion-mnist"), ("lenet", "mnist"), ("mlp", "mnist"),
)  # fmt: skip
#: The same number of steps for every method.
FINE_TUNING = {"images": 10_000, "epochs": 1, "learning_rate": 0.05}
#: Networks without batch normalization need a smaller learning rate.
SMALLER_STEPS = {"lenet": 0.02, "mlp": 0.02}
STAGES = 4  #: of gradual compression, which split the fine-tuning steps
CALIBRATION_IMAGES = 128


class Small(NamedTuple):
    """A compressed network and the bytes of its weights."""

    model: nn.Module
    nbytes: int


def run(quick: bool, folder: Path, cells: str = "") -> int:
    """Run the unfinished cells, and write the table."""
    return study.execute(STUDY, "cnn", folder, quick=quick, pattern=cells)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield each network with each method and density."""
    for model, dataset in [("vgg", "digits")] if quick else NETWORKS:
        network = {"model": model, "data": dataset}
        fine_tuning = {**FINE_TUNING, **({"images": 512} if quick else {})}
        if model in SMALLER_STEPS:
            fine_tuning["learning_rate"] = SMALLER_STEPS[model]
        yield {**network, "method": "dense"}
        for density in (0.2,) if quick else (0.2, 0.1):
            for method in (*METHODS, *GRADUAL):
                yield {**network, "method": method, "density": density, **fine_tuning}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the size, FLOPs and accuracy of a compressed network."""
    train_x, train_y, *test = data.load(cell["data"])
    n_images = cell.get("images")
    train_x, train_y = train_x[:n_images], train_y[:n_images]
    model = training.trained(cell["model"], cell["data"], cell["seed"])
    if cell["method"] == "dense":
        return {"accuracy": training.accuracy(model, *test), **_cost(Small(model, 0), train_x)}
    if cell["method"] in GRADUAL:
        small = _gradually(model, cell, train_x, train_y)
        return {"fine_tuned": training.accuracy(small.model, *test), **_cost(small, train_x)}
    small = METHODS[cell["method"]](model, cell, train_x[:CALIBRATION_IMAGES])
    result = {"accuracy": training.accuracy(small.model, *test), **_cost(small, train_x)}
    if reestimate_batch_norm(small.model, train_x[:CALIBRATION_IMAGES].split(64)):
        result["reestimated"] = training.accuracy(small.model, *test)
    training.train(small.model, train_x, train_y, seed=cell["seed"], **_schedule(cell))
    return {**result, "fine_tuned": training.accuracy(small.model, *test)}


def _schedule(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("epochs", "learning_rate")}


def _cost(small: Small, images: Tensor) -> dict[str, int]:
    values = sum(p.values.numel() for p in prunable_parameters(small.model))
    flops = count_flops(small.model, images[:1]).total
    return {"values": values, "nbytes": small.nbytes or 4 * values, "flops": flops}


def _selection(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the layers to compress: all except the first and the last.

    The first layer of the MLP is also compressed, since it holds half of the values.
    """
    return {
        "density": cell["density"],
        "keep": ("last",) if cell["model"] == "mlp" else ("first", "last"),
    }


def _compressed(
    method: str, calibrated: bool, model: nn.Module, cell: Any, images: Tensor
) -> Small:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer may be kept silently
        # One batch in five is held out: of eight these are two.
        calibration = images.chunk(8) if calibrated else None
        model, report = compress(model, method, calibration=calibration, **_selection(cell))
    return Small(model, report.nbytes)


def _tucker(model: nn.Module, cell: dict[str, Any], images: Tensor) -> Small:
    """Give each layer the largest ranks that its density allows."""
    _, plan = compress(model, "magnitude", dry_run=True, **_selection(cell))
    for row in plan:
        if row.status == "planned":
            model = _tucker_layer(model, row.layer, cell["density"] * row.rows * row.columns)
    return Small(model, 0)


def _tucker_layer(model: nn.Module, name: str, limit: float) -> nn.Module:
    """Decompose one layer into parts of at most `limit` values, by bisection on their ranks."""

    def decomposed(share: float) -> tuple[nn.Module, int]:
        small = tucker_svd(model, ranks=share, singular_values=share, layers=[name])
        return small, sum(p.numel() for p in small.get_submodule(name).parameters() if p.ndim > 1)

    low, high = 1e-6, 1.0  # ranks of one, and all
    for _ in range(10):
        share = (low + high) / 2
        low, high = (share, high) if decomposed(share)[1] <= limit else (low, share)
    return decomposed(low)[0]


def _gradually(model: nn.Module, cell: dict[str, Any], images: Tensor, labels: Tensor) -> Small:
    """Compress in stages, with as many training steps in total as other methods."""

    def train(network: nn.Module, stage: int) -> None:
        left = STAGES - stage
        options = _schedule(cell)
        options["learning_rate"] *= left / STAGES
        chosen = slice(stage, None, STAGES)
        training.train(
            network, images[chosen], labels[chosen], seed=cell["seed"], last=1 - 1 / left, **options
        )

    method = GRADUAL[cell["method"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, report = compress_gradually(
            model, method, train=train, n_stages=STAGES, **_selection(cell)
        )
    return Small(small, report.nbytes)


def tables(rows: list[Row]) -> str:
    """Return one table a network."""
    networks = dict.fromkeys((row["model"], row["data"]) for row in rows)
    return "\n".join(_table(model, dataset, rows) for model, dataset in networks)


def _table(model: str, dataset: str, rows: list[Row]) -> str:
    chosen = [row for row in rows if (row["model"], row["data"]) == (model, dataset)]
    header = (
        "density", "method", "accuracy, %", "batch norm re-estimated", "fine-tuned", "values",
        "bytes", "MFLOPs",
    )  # fmt: skip
    lines = []
    for row in chosen:
        found = (_percent(row.get(n)) for n in ("accuracy", "reestimated", "fine_tuned"))
        values, nbytes, flops = (row[n].mean for n in ("values", "nbytes", "flops"))
        density = f"{row.get('density', 1.0):.0%}"
        lines.append(
            (
                density,
                row["method"],
                *found,
                f"{values:,.0f}",
                f"{nbytes:,.0f}",
                f"{flops / 1e6:.2f}",
            )
        )
    return f"### {model}, {dataset}\n\n{markdown_table(header, lines)}"


def _percent(value: Spread | None) -> str:
    if value is None:
        return "–"
    return format(Spread(100 * value.mean, 100 * value.deviation, value.count), ".1f")


def figure(rows: list[Row]) -> Figure:
    """Draw accuracies before and after fine-tuning at the lowest density, a panel for a network."""
    networks = list(dict.fromkeys((row["model"], row["data"]) for row in rows))
    drawn = Figure(figsize=(4.2 * len(networks), 3.6), layout="constrained", dpi=150)
    panels = drawn.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        chosen = [row for row in rows if (row["model"], row["data"]) == network]
        lowest = min(row.get("density", 1.0) for row in chosen)
        chosen = [row for row in chosen if row.get("density", 1.0) == lowest]
        for offset, name in ((-0.2, "accuracy"), (0.2, "fine_tuned")):
            points = [(i + offset, row[name].mean) for i, row in enumerate(chosen) if row.get(name)]
            if points:
                axes.bar(*zip(*points, strict=True), width=0.4, label=name.replace("_", "-"))
        axes.set_xticks(range(len(chosen)), [row["method"] for row in chosen], rotation=60)
        axes.set(title=f"{network[0]}, {network[1]}, density {lowest:g}", ylim=(0, 1))
    panels[0].legend(frameon=False)
    return drawn


GRADUAL = {"gradual magnitude": "magnitude", "gradual DSF": "dsf"}
METHODS: dict[str, Callable[..., Small]] = {
    "magnitude": partial(_compressed, "magnitude", False),
    "Wanda": partial(_compressed, "wanda", True),
    "ADMM": partial(_compressed, "admm", True),
    "SparseGPT": partial(_compressed, "sparsegpt", True),
    "OBC": partial(_compressed, "obs", True),
    "DSF": partial(_compressed, "dsf", False),
    "DSF, calibrated": partial(_compressed, "dsf", True),
    "low rank": partial(_compressed, "lowrank", False),
    "Tucker": _tucker,
}
STUDY = SimpleNamespace(SEEDS=SEEDS, cells=cells, run=measure, table=tables, figure=figure)
