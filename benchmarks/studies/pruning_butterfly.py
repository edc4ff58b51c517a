"""Pruning scores on networks with butterfly layers (Zhang: Tables 1 and 2, Figures 1 to 3).

Networks are pruned before training, by magnitude after a short training, and then trained. As in
the paper, butterfly heads are left alone; beyond it, the factors of butterfly layers are pruned
too. Seconds of inference are cells of their own, to be run on a quiet machine:
``--cells '"kind": "time"'``.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.harness import Row
from benchmarks.networks.models import build
from benchmarks.networks.training import accuracy
from benchmarks.studies._training import loss, n_weights, subset, train
from benchmarks.tables import markdown_table
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.structured import ButterflyLinear, KaleidoscopeLinear
from matfact.torch.pruning import (
    LayerCollapseWarning,
    PruningReport,
    count_flops,
    make_permanent,
    prune_network,
)

SEEDS = 2
METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
STRUCTURES = ("dense", "butterfly head", "butterfly", "kaleidoscope")
_COLOURS = ("#999999", "#0072B2", "#D55E00", "#CC79A7", "#009E73")
#: Where the sparsity of layers is shown.
_LAYERS_AT = 0.5
#: How many times the epochs are that unpruned networks are trained for, too.
_LONGER = 4
#: Batches that SNIP and GraSP see.
_SCORED = 2

_FULL = {
    "mlp": {"data": "mnist", "side": 28, "width": 128, "n_train": 6000, "epochs": 3, "before": 1},
    "vgg": {
        "data": "fashion-mnist", "side": 14, "width": 16, "n_train": 6000, "epochs": 2, "before": 1,
    },
}  # fmt: skip
_QUICK = {
    "mlp": {"data": "digits", "side": 8, "width": 32, "n_train": 1000, "epochs": 6, "before": 2},
    "vgg": {"data": "digits", "side": 8, "width": 8, "n_train": 400, "epochs": 4, "before": 1},
}


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    settings = _QUICK if quick else _FULL
    for name, setting in settings.items():
        yield {"kind": "time", "network": name, **setting, "seed": 0}
    for name, setting in settings.items():
        for structure, pruned, method, exponent in _pruned(quick):
            yield {
                "kind": "prune", "network": name, **setting, "structure": structure,
                "pruned": pruned, "method": method, "exponent": exponent,
            }  # fmt: skip
        for structure in () if quick else STRUCTURES:  # some train more slowly than others
            longer = {**setting, "epochs": _LONGER * setting["epochs"]}
            yield {
                "kind": "prune", "network": name, **longer, "structure": structure,
                "pruned": "nothing", "method": "none", "exponent": 0,
            }  # fmt: skip


def _pruned(quick: bool) -> Iterator[tuple[str, str, str, float]]:
    """Yield what is pruned: the structure, its part, the score and −log₁₀ of the share kept.

    What tells most comes first.
    """
    for structure in STRUCTURES:
        yield structure, "nothing", "none", 0
    for exponent in (_LAYERS_AT,) if quick else (1, 0.5, 2, 0.2, 0.1, 0.05):
        for structure in ("dense", "butterfly head"):
            for method in METHODS:
                yield structure, "dense layers", method, exponent
        if exponent in (0.5, 1):
            for structure in ("butterfly head", "butterfly"):
                for method in ("synflow",) if quick else METHODS:
                    yield structure, "factors too", method, exponent


def run(cell: dict[str, Any]) -> dict[str, Any]:
    return _time(cell) if cell["kind"] == "time" else _prune(cell)


def _prune(cell: dict[str, Any]) -> dict[str, Any]:
    """Prune a network, train it, and count what is left of it."""
    train_x, train_y, test_x, test_y = subset(cell["data"], cell["side"], cell["n_train"], 2500)
    seed, method = cell["seed"], cell["method"]
    model = network(cell, cell["structure"])
    reference = network(cell, "dense")
    keep, collapsed = 10.0 ** -cell["exponent"], 0
    if method == "magnitude":
        train(model, train_x, train_y, epochs=cell["before"], seed=seed)
    if method != "none":
        scored = [(train_x[i::50], train_y[i::50]) for i in range(_SCORED)]
        report = _mask(
            model, method, keep, scored, loss=loss, random_state=seed,
            prunable=None if cell["pruned"] == "factors too" else _is_dense,
        )  # fmt: skip
        collapsed = len(report.collapsed)
    train(model, train_x, train_y, epochs=cell["epochs"], seed=seed)
    if method != "none":
        make_permanent(model)
    flops, dense = _flops(model, train_x), _flops(reference, train_x)
    return {
        "accuracy": accuracy(model, test_x, test_y),
        "stored": n_weights(model) / n_weights(reference),
        "flop_sparsity": 1 - sum(flops.values()) / sum(dense.values()),
        "collapsed": collapsed,
        "is_collapsed": collapsed > 0,
        "layer_sparsity": {name: 1 - flops[name] / n for name, n in dense.items()},
    }


def _mask(model: nn.Module, *arguments: Any, **options: Any) -> PruningReport:
    """Prune without the warning of collapsed layers, which the results mark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        return prune_network(model, *arguments, **options)


def network(cell: dict[str, Any], structure: str) -> nn.Module:
    """Return an untrained network, some of whose layers are structured."""
    torch.manual_seed(cell["seed"])
    model = build(cell["network"], image_size=cell["side"], width=cell["width"])
    if structure == "dense":
        return model
    kind = KaleidoscopeLinear if structure == "kaleidoscope" else ButterflyLinear
    layers = _layers(model)
    for name in layers[-1:] if structure == "butterfly head" else layers:
        new = _structured(model.get_submodule(name), kind, cell["seed"])
        if sum(p.numel() for p in new.parameters()) < sum(
            p.numel() for p in model.get_submodule(name).parameters()
        ):
            model.set_submodule(name, new)
    return model


def _layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def _structured(layer: Any, kind: Any, seed: int) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return FactorizedConv.from_scratch(layer, kind, random_state=seed)
    return kind(layer.in_features, layer.out_features, random_state=seed)


def _is_dense(module: nn.Module, name: str) -> bool:
    return name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))


def _flops(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Return the FLOPs of each layer for one image."""
    flops: dict[str, int] = {}
    for label, count in count_flops(model, images[:1]).kept.items():
        layer = label.split(".factors")[0].split(".kernels")[0].removesuffix(".weight")
        flops[layer] = flops.get(layer, 0) + count
    return flops


def _time(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of inference, interleaved, of networks without any training."""
    images, *_ = subset(cell["data"], cell["side"], 256, 1)
    models = {structure: network(cell, structure).eval() for structure in STRUCTURES}
    for exponent in (1, 2):
        pruned = network(cell, "dense")
        _mask(pruned, "magnitude", 10.0**-exponent, scope="layer")
        models[f"dense, magnitude, 10^-{exponent}"] = make_permanent(pruned).eval()
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():  # compile, and compute what is kept
            model(images)
        for _ in range(9):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "seconds": medians,
        "ratio": {name: median / medians["dense"] for name, median in medians.items()},
    }


def table(rows: list[Row]) -> str:
    parts = []
    for name in dict.fromkeys(row["network"] for row in rows):
        chosen = [r for r in rows if r["network"] == name and r["kind"] == "prune"]
        for title, result in (("accuracy, %", "accuracy"), ("FLOP sparsity, %", "flop_sparsity")):
            parts += [f"\n### {name}: {title}\n", _methods_table(chosen, result)]
        parts += [f"\n### {name}: nothing pruned\n", _structures_table(chosen)]
        parts += [f"\n### {name}: FLOP sparsity of layers at 10^-0.5, %\n", _layers_table(chosen)]
        parts += [f"\n### {name}: seconds of inference\n", _times_table(rows, name)]
    note = "† marks networks of which a layer has collapsed, with the share of seeds if not all.\n"
    return note + "\n".join(parts)


def _methods_table(rows: list[Row], result: str) -> str:
    groups: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        if row["method"] != "none":
            group = row["structure"], row["pruned"], row["exponent"]
            groups.setdefault(group, {})[row["method"]] = _percent(row, result)
    lines = [
        (*group[:2], f"10^-{group[2]}", *(groups[group].get(m, "–") for m in METHODS))
        for group in sorted(groups, key=lambda group: (group[1], group[0] != "dense", *group[::2]))
    ]
    return markdown_table(("layers", "pruned", "keep", *METHODS), lines)


def _percent(row: Row, result: str) -> str:
    spread = row[result]
    text = f"{100 * spread.mean:.1f}"
    text += f" ± {100 * spread.deviation:.1f}" if spread.count > 1 else ""
    share = row["is_collapsed"].mean
    return text + ("" if not share else " †" if share == 1 else f" †{share:.2g}")


def _structures_table(rows: list[Row]) -> str:
    results = ("accuracy", "stored", "flop_sparsity")
    lines = [
        (row["structure"], row["epochs"], *(_percent(row, name) for name in results))
        for row in rows
        if row["method"] == "none"
    ]
    header = ("layers", "epochs", "accuracy, %", "weights ÷ those of dense, %", "FLOP sparsity, %")
    return markdown_table(header, lines)


def _by_layer(rows: list[Row]) -> dict[tuple[str, str], list[float]]:
    """Return the sparsities of layers for each head and method at 10^-0.5."""
    return {
        (row["structure"], row["method"]): [s.mean for s in row["layer_sparsity"].values()]
        for row in rows
        if row["exponent"] == _LAYERS_AT and row["pruned"] == "dense layers"
    }


def _layers_table(rows: list[Row]) -> str:
    lines = [
        (*group, *(f"{100 * sparsity:.0f}" for sparsity in sparsities))
        for group, sparsities in _by_layer(rows).items()
    ]
    n_layers = max((len(line) for line in lines), default=2) - 2
    return markdown_table(("layers", "method", *range(1, n_layers + 1)), lines)


def _times_table(rows: list[Row], name: str) -> str:
    lines = [
        (label, f"{1e3 * seconds.mean:.1f}", f"{row['ratio'][label].mean:.2f}")
        for row in rows
        if row["network"] == name and row["kind"] == "time"
        for label, seconds in row["seconds"].items()
    ]
    return markdown_table(("network", "ms for 256 images", "÷ dense"), lines)


def figure(rows: list[Row]) -> Figure:
    """Return accuracy and FLOP sparsity against the share kept, and the latter by layer."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    drawing = Figure(figsize=(11, 3.4 * len(names)), layout="constrained", dpi=80)
    panels = drawing.subplots(len(names), 3, squeeze=False)
    colours = dict(
        zip(METHODS, ("#999999", "#0072B2", "#D55E00", "#CC79A7", "#009E73"), strict=True)
    )
    styles = {"dense": "-", "butterfly head": "--"}
    for name, (left, middle, right) in zip(names, panels, strict=True):
        chosen = [
            r for r in rows
            if r["network"] == name and r["kind"] == "prune" and r["pruned"] == "dense layers"
        ]  # fmt: skip
        for (structure, method), sparsities in _by_layer(chosen).items():
            style = {"linestyle": styles[structure], "color": colours[method]}
            curve = sorted(
                (r["exponent"], r["accuracy"].mean, r["flop_sparsity"].mean)
                for r in chosen
                if (r["structure"], r["method"]) == (structure, method)
            )
            exponents, accuracies, savings = zip(*curve, strict=True)
            label = method if structure == "dense" else None
            left.plot(exponents, accuracies, marker=".", label=label, **style)
            middle.plot(exponents, savings, marker=".", **style)
            right.plot(range(1, len(sparsities) + 1), sparsities, marker=".", **style)
        left.set(title=name, xlabel="k, keep $10^{-k}$", ylabel="accuracy")
        middle.set(xlabel="k", ylabel="FLOP sparsity", title="dashed: butterfly head")
        right.set(xlabel="layer", ylabel="FLOP sparsity", title="layers at $10^{-0.5}$")
    panels[0][0].legend(frameon=False)
    return drawing
