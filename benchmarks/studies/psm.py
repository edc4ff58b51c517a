"""Products of sparse matrices against low rank and pruning (Giffon et al. 2021).

Every layer of a trained network becomes a product of Q sparse factors, each of which keeps the K
largest entries of every row and column, and the network is trained on. Layers that would store
more than before are kept as they are.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.harness import Row
from benchmarks.networks.models import build
from benchmarks.networks.training import accuracy
from benchmarks.studies._training import n_weights, subset, train
from benchmarks.tables import markdown_table
from matfact import DoubleSparseFactorizer, Palm4MSA
from matfact.constraints import RowColumnSparsity
from matfact.torch import compress, randomize_supports, reset_parameters
from matfact.torch.pruning import (
    GradualMagnitude,
    LayerCollapseWarning,
    make_permanent,
    prune_network,
)
from matfact.torch.tensor_decomposition import tensor_train, tucker_svd

SEEDS = 2
_FULL = {
    "lenet": {"data": "mnist", "side": 28, "width": 6, "n_train": 6000, "epochs": 5, "tuning": 2},
    "vgg": {
        "data": "fashion-mnist", "side": 14, "width": 16, "n_train": 6000, "epochs": 4, "tuning": 2,
    },
}  # fmt: skip
_QUICK = {
    "vgg": {"data": "digits", "side": 8, "width": 8, "n_train": 1000, "epochs": 5, "tuning": 2},
}


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    for name, setting in (_QUICK if quick else _FULL).items():
        for method, parameters in _quick_methods() if quick else _methods():
            yield {"network": name, **setting, "method": method, **parameters}


def _methods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield methods with their parameters, those that tell most first."""
    yield "dense", {}
    for method in ("PSM", "PSM re-init.", "PSM random"):
        for Q in (2, 3):
            for K in (2, 14):
                yield method, {"Q": Q, "K": K}
    for keep in (0.2, 0.1, 0.05, 0.02):
        yield "hard pruning", {"keep": keep}
        yield "iterative pruning", {"keep": keep}
    for rank in (6, 10, 14):
        yield "tensor train", {"max_rank": rank}
    for share in (0.2, 0.1):
        yield "Tucker-SVD", {"singular_values": share}
    for K in (2, 4, 8, 14):
        yield "DSF", {"K": K}
    for Q in (2, 3):
        for K in (4, 8):
            yield "PSM", {"Q": Q, "K": K}


def _quick_methods() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "dense", {}
    for method in ("PSM", "PSM re-init.", "PSM random"):
        yield method, {"Q": 2, "K": 2}
    yield "hard pruning", {"keep": 0.1}
    yield "iterative pruning", {"keep": 0.1}
    yield "tensor train", {"max_rank": 6}
    yield "Tucker-SVD", {"singular_values": 0.2}
    yield "DSF", {"K": 2}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    train_x, train_y, test_x, test_y = subset(cell["data"], cell["side"], cell["n_train"], 2500)
    dense = _trained(*(cell[name] for name in _NETWORK))
    model = copy.deepcopy(dense)
    after_step: Callable[[], Any] = lambda: None  # noqa: E731
    errors: dict[str, float] = {}
    if cell["method"] == "iterative pruning":
        n_steps = cell["tuning"] * -(-len(train_x) // 64)
        pruner = GradualMagnitude(model, cell["keep"], steps=n_steps * 2 // 3, every=5)
        after_step = pruner.step
    elif cell["method"] != "dense":
        model, errors = _compressed(model, cell)
    before = accuracy(model, test_x, test_y)
    if cell["method"] != "dense":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LayerCollapseWarning)
            options = {"epochs": cell["tuning"], "seed": cell["seed"], "learning_rate": 1e-3}
            train(model, train_x, train_y, after_step=after_step, **options)
    if "pruning" in cell["method"]:
        make_permanent(model)
    return {
        "accuracy": accuracy(model, test_x, test_y),
        "before_tuning": before,
        "weights": n_weights(model),
        "stored": n_weights(model) / n_weights(dense),
        "errors": errors,
    }


_NETWORK = ("network", "data", "side", "width", "n_train", "epochs", "seed")


@functools.cache
def _trained(
    name: str, data: str, side: int, width: int, n_train: int, epochs: int, seed: int
) -> nn.Module:
    train_x, train_y, _, _ = subset(data, side, n_train, 1)
    torch.manual_seed(seed)
    model = build(name, image_size=side, width=width)
    return train(model, train_x, train_y, epochs=epochs, seed=seed)


def _compressed(model: nn.Module, cell: dict[str, Any]) -> tuple[nn.Module, dict[str, float]]:
    """Return the network before it is trained on, and the relative errors of its layers."""
    method, seed = cell["method"], cell["seed"]
    if method == "hard pruning":
        prune_network(model, "magnitude", cell["keep"], scope="layer")
        return model, {}
    if method == "tensor train":
        return tensor_train(model, cell["max_rank"]), {}
    if method == "Tucker-SVD":
        return tucker_svd(model, singular_values=cell["singular_values"]), {}
    n_factors, level = cell.get("Q", 2), cell["K"]
    sizes = {name: _stored(layer, n_factors, level) for name, layer in _layers(model).items()}
    smaller = {name: share for name, share in sizes.items() if share < 1}
    if method == "DSF":
        factorizer, overrides = DoubleSparseFactorizer(), smaller
    else:
        factorizer = Palm4MSA(constraints=[RowColumnSparsity(level)] * n_factors)
        overrides = {}
    model, report = compress(model, factorizer, layers=list(smaller), overrides=overrides)
    if method == "PSM re-init.":
        reset_parameters(model, random_state=seed)
    if method == "PSM random":
        randomize_supports(model, random_state=seed)
    return model, {row.layer: row.relative_error for row in report if row.relative_error}


def _layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def _stored(layer: Any, n_factors: int, level: int) -> float:
    """Return the most that a product can store of a layer, in entries of its weight."""
    rows, columns = layer.weight.flatten(1).shape
    side = min(rows, columns)
    shapes = [(side, side)] * (n_factors - 1) + [(side, max(rows, columns))]
    constraint = RowColumnSparsity(level)
    return sum(constraint.nnz(shape) for shape in shapes) / math.prod((rows, columns))


def _label(row: Row) -> str:
    """Return what a method is called with its parameters."""
    if row["method"].startswith("PSM"):
        return f"{row['method']} Q={row['Q']} K={row['K']}"
    parameters = {
        "keep": lambda v: f" {100 * (1 - v):.0f} %", "max_rank": lambda v: f" R={v}",
        "singular_values": lambda v: f" {100 * v:.0f} %", "K": lambda v: f" (as many as Q=2 K={v})",
    }  # fmt: skip
    return row["method"] + "".join(
        show(row[name]) for name, show in parameters.items() if name in row.cell
    )


def table(rows: list[Row]) -> str:
    parts = []
    for name in dict.fromkeys(row["network"] for row in rows):
        chosen = [row for row in rows if row["network"] == name]
        lines = [
            (
                _label(row), f"{row['weights'].mean:.0f}", f"{100 * row['stored'].mean:.1f}",
                *(_percent(row[result]) for result in ("before_tuning", "accuracy")),
            )
            for row in chosen
        ]  # fmt: skip
        header = ("method", "weights", "÷ dense, %", "accuracy before tuning, %", "accuracy, %")
        parts += [f"### {name}\n", markdown_table(header, lines)]
        parts += [f"### {name}: relative errors of layers\n", _errors_table(chosen)]
    return "\n".join(parts)


def _percent(spread: Any) -> str:
    text = f"{100 * spread.mean:.1f}"
    return text + (f" ± {100 * spread.deviation:.1f}" if spread.count > 1 else "")


def _with_errors(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["errors"] and row["method"] in ("PSM", "DSF")]


def _errors_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in _with_errors(rows) for name in row["errors"]))
    lines = [
        (_label(row), *(_error(row["errors"].get(name)) for name in names))
        for row in _with_errors(rows)
    ]
    return markdown_table(("method", *names), lines)


def _error(spread: Any) -> str:
    return "–" if spread is None else f"{spread.mean:.3f}"


_COLOURS = {
    "PSM": "#0072B2", "PSM re-init.": "#56B4E9", "PSM random": "#CC79A7", "DSF": "#000000",
    "hard pruning": "#E69F00", "iterative pruning": "#D55E00", "tensor train": "#009E73",
    "Tucker-SVD": "#999999",
}  # fmt: skip


def figure(rows: list[Row]) -> Figure:
    """Return accuracy against stored weights, and the errors of layers."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    drawing = Figure(figsize=(9.5, 3.6 * len(names)), layout="constrained", dpi=80)
    panels = drawing.subplots(len(names), 2, squeeze=False)
    for name, (left, right) in zip(names, panels, strict=True):
        chosen = [row for row in rows if row["network"] == name]
        for method, colour in _COLOURS.items():
            of_method = [row for row in chosen if row["method"] == method]
            for Q in dict.fromkeys(row.get("Q") for row in of_method):
                points = sorted(
                    (row["weights"].mean, row["accuracy"].mean)
                    for row in of_method
                    if row.get("Q") == Q
                )
                label = method + (f" Q={Q}" if Q else "")
                style = "s--" if Q == 3 else "o-"
                left.plot(*zip(*points, strict=True), style, color=colour, ms=4, label=label)
        for row in chosen:
            if row["method"] == "dense":
                left.axhline(row["accuracy"].mean, color="0.7", linewidth=1)
        for row in _with_errors(chosen):
            if row["K"] in (2, 14):
                errors = [spread.mean for spread in row["errors"].values()]
                right.plot(list(row["errors"]), errors, marker=".", label=_label(row))
        left.set(xscale="log", xlabel="weights stored", ylabel="accuracy", title=name)
        right.set(xlabel="layer", ylabel="relative error", ylim=(0, 1))
    for axes in panels.flat:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=6)
    return drawing
