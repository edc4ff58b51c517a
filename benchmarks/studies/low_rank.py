"""Low rank by singular triples (Liu et al.): blockings and scores against ALDS, up to 99 %.

Each layer of a trained network is cut into blocks, the singular triples of all blocks of all
layers are scored, and those of the highest scores are kept while the values that they store fit
the budget. The accuracy is that of the network with the truncated weights, with no training after
it, and then with the statistics of batch normalization taken anew, where there is any. ALDS
chooses strips and ranks by singular values alone. Seconds are those of the processor,
for scores and choice at all sparsities.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.harness import Row
from benchmarks.tables import markdown_table
from matfact.allocation import (
    alds_ranks,
    magnitude_scores,
    rank_triples,
    relative_error_scores,
    strip_spectra,
    truncated_blocks,
)
from matfact.solvers.block_svd import Blocking, square_grid

SEEDS = 2
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
#: The grid into which a matrix of some shape is cut.
BLOCKINGS: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
    "none": lambda shape: (1, 1),
    "alds": lambda shape: (1, min(4, shape[1])),
    "square": square_grid,
}
#: Of the scores of triples, whether they are divided by the values that a triple stores.
SCORES = {
    "magnitude": False, "relative error": False, "perturbation": False, "variance": False,
    "perturbation ÷ cost": True,
}  # fmt: skip
#: ALDS as published, whose error of a layer is the largest of its strips; and with that of k
#: strips multiplied by √k, by which the error of the layer can be larger.
ALDS = {"ALDS": False, "ALDS, √k": True}
#: Most column strips that ALDS tries.
MAX_STRIPS = 64
#: Images that triples are scored on, and that accuracy is measured on.
N_IMAGES, N_TEST = 128, 2000

Matrices = dict[str, np.ndarray]
#: Chooses the truncated weights for a number of stored values; None where nothing fits.
Choice = Callable[[int], Matrices | None]


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    if quick:
        networks = [{"network": "mlp", "data": "digits", "images": 2000, "width": 32, "epochs": 20}]
    else:
        networks = [
            {"network": "vgg", "data": "fashion-mnist", "images": 10_000, "width": 8, "epochs": 5},
            {
                "network": "mlp",
                "data": "fashion-mnist",
                "images": 10_000,
                "width": 256,
                "epochs": 10,
            },
        ]
    for network in networks:
        for blocking in BLOCKINGS:
            for score in SCORES:
                yield {"part": "accuracy", **network, "blocking": blocking, "score": score}
        for score in ALDS:
            yield {"part": "accuracy", **network, "blocking": "searched", "score": score}
        yield {"part": "agreement", **network, "blocking": "none"}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.networks.data import load
    from benchmarks.networks.training import trained

    recipe = {"width": cell["width"], "epochs": cell["epochs"], "n_images": cell["images"]}
    model = trained(cell["network"], cell["data"], cell["seed"], **recipe)
    images, _, *test = load(cell["data"])
    test = [part[:N_TEST] for part in test]
    if cell["part"] == "agreement":
        return agreement(model, images[:N_IMAGES])
    return accuracies(model, images[:N_IMAGES], test, cell["blocking"], cell["score"])


def accuracies(
    model: Any, images: Any, test: Sequence[Any], blocking: str, score: str
) -> dict[str, Any]:
    """Return the accuracy at each sparsity, and how many layers have no triple left."""
    from benchmarks.networks.training import accuracy
    from matfact.torch import reestimate_batch_norm

    W = matrices(model)
    entries = sum(weight.size for weight in W.values())
    start = time.process_time()
    if score in ALDS:
        choose = alds(W, channels(model), ALDS[score])
    else:
        choose = by_score(W, model, images, blocking, score)
    chosen = {sparsity: choose(int((1 - sparsity) * entries + 1e-6)) for sparsity in SPARSITIES}
    seconds = time.process_time() - start
    result: dict[str, Any] = {"dense": accuracy(model, *test), "seconds": seconds}
    result |= {"accuracy": {}, "reestimated": {}, "emptied": {}}
    for sparsity, weights in chosen.items():
        if weights is None:
            continue
        truncated = replaced(model, weights)
        result["accuracy"][str(sparsity)] = accuracy(truncated, *test)
        if reestimate_batch_norm(truncated, [images]):
            result["reestimated"][str(sparsity)] = accuracy(truncated, *test)
        emptied = sum(not weight.any() for weight in weights.values())
        result["emptied"][str(sparsity)] = emptied
    return result


def by_score(W: Matrices, model: Any, images: Any, blocking: str, score: str) -> Choice:
    """Rank the triples of all layers by a score."""
    grids = {name: BLOCKINGS[blocking](weight.shape) for name, weight in W.items()}
    blockings = {name: Blocking(weight.shape, grids[name]) for name, weight in W.items()}
    costs = {name: blocking.costs for name, blocking in blockings.items()}
    scores = scored(W, model, images, grids, score)

    def choose(budget: int) -> Matrices:
        kept = rank_triples(scores, costs, budget, per_value=SCORES[score])
        products = {n: truncated_blocks(weight, kept[n], grids[n]) for n, weight in W.items()}
        assert sum(product.nnz for product in products.values()) <= budget
        return {name: product.toarray() for name, product in products.items()}

    return choose


def scored(
    W: Matrices, model: Any, images: Any, grids: Mapping[str, tuple[int, int]], score: str
) -> dict[str, list[np.ndarray]]:
    """Return the score of each triple of each block of each layer."""
    from matfact.torch import triple_scores

    statistic = score.partition(" ")[0]
    if statistic in ("perturbation", "variance"):
        return triple_scores(model, [images], grids=grids, statistic=statistic)
    spectra = {
        name: [np.linalg.svdvals(block) for block in Blocking(w.shape, grids[name]).cut(w)]
        for name, w in W.items()
    }
    if score == "magnitude":
        return {name: magnitude_scores(values) for name, values in spectra.items()}
    return {
        name: relative_error_scores(values, np.linalg.norm(W[name], 2))
        for name, values in spectra.items()
    }


def alds(W: Matrices, n_channels: Mapping[str, int], with_root: bool) -> Choice:
    """Choose strips and ranks of all layers as ALDS does."""
    errors = {
        name: strip_spectra(weight.astype(np.float64), divisors(n_channels[name], MAX_STRIPS))
        for name, weight in W.items()
    }
    if with_root:
        errors = {name: {k: k**0.5 * e for k, e in by.items()} for name, by in errors.items()}
    shapes = {name: weight.shape for name, weight in W.items()}

    def choose(budget: int) -> Matrices | None:
        try:
            ranks, _ = alds_ranks(errors, shapes, budget)
        except ValueError:  # rank one everywhere is too much
            return None
        return {
            name: truncated_blocks(
                weight, [np.arange(ranks[name].rank)] * ranks[name].strips, (1, ranks[name].strips)
            ).toarray()
            for name, weight in W.items()
        }

    return choose


def divisors(n: int, largest: int) -> list[int]:
    return [k for k in range(1, min(n, largest) + 1) if n % k == 0]


def agreement(model: Any, images: Any) -> dict[str, Any]:
    """Return Spearman's correlation of all scores with the exact ones, and their seconds."""
    from matfact.torch import exact_triple_scores

    W = matrices(model)
    grids = dict.fromkeys(W, (1, 1))
    found, seconds = {}, {}

    def timed(name: str, scores: Callable[[], dict[str, list[np.ndarray]]]) -> None:
        start = time.process_time()
        by_layer = scores()
        seconds[name] = time.process_time() - start
        found[name] = np.concatenate([block for blocks in by_layer.values() for block in blocks])

    for score in ("magnitude", "relative error", "perturbation", "variance"):
        timed(score, lambda score=score: scored(W, model, images, grids, score))
    for statistic in ("perturbation", "variance"):
        timed(
            f"exact {statistic}",
            lambda s=statistic: exact_triple_scores(model, [images], grids=grids, statistic=s),
        )
    correlations = {
        exact: {name: float(spearmanr(values, found[exact])[0]) for name, values in found.items()}
        for exact in ("exact perturbation", "exact variance")
    }
    return {"triples": len(found["magnitude"]), "spearman": correlations, "seconds": seconds}


def _layers(model: Any) -> dict[str, Any]:
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def matrices(model: Any) -> Matrices:
    """Return the weights of all linear and convolutional layers as matrices."""
    return {n: layer.weight.detach().flatten(1).numpy() for n, layer in _layers(model).items()}


def channels(model: Any) -> dict[str, int]:
    """Return the input channels, or features, of each layer."""
    return {name: layer.weight.shape[1] for name, layer in _layers(model).items()}


def replaced(model: Any, weights: Matrices) -> Any:
    """Return a copy of the network with other weights."""
    import torch

    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in _layers(result).items():
            values = torch.from_numpy(np.ascontiguousarray(weights[name]))
            layer.weight.copy_(values.reshape(layer.weight.shape))
    return result


def table(rows: Sequence[Row]) -> str:
    sections = []
    for name, chosen in _networks(rows, "accuracy").items():
        title = f"### {name}: accuracy at sparsities, {chosen[0]['dense']:.3f} when dense"
        note = "In brackets: layers without a triple, on average, where there are any."
        sections.append(f"{title}\n\n{note}\n\n{_accuracy_table(chosen, 'accuracy')}")
        if chosen[0]["reestimated"]:
            note = "With statistics of batch normalization taken anew:"
            sections.append(f"{note}\n\n{_accuracy_table(chosen, 'reestimated')}")
    for name, (row,) in _networks(rows, "agreement").items():
        exact = list(row["spearman"])
        lines = [
            [score, *(f"{row['spearman'][e][score]:.3f}" for e in exact), f"{spent:.2f}"]
            for score, spent in row["seconds"].items()
        ]
        title = (
            f"### {name}: Spearman's correlation over {row['triples'].mean:.0f} triples, no blocks"
        )
        head = ["score", *(f"with {e}" for e in exact), "seconds"]
        sections.append(f"{title}\n\n{markdown_table(head, lines)}")
    return "\n".join(sections)


def _networks(rows: Sequence[Row], part: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == part:
            label = f"{row['network']} of width {row['width']}, {row['data']}"
            groups.setdefault(label, []).append(row)
    return groups


def _accuracy_table(rows: Sequence[Row], result: str) -> str:
    lines = [
        [row["blocking"], row["score"], *_accuracies(row, result), f"{row['seconds'].mean:.1f}"]
        for row in rows
    ]
    head = ["blocking", "score", *(f"{s:.0%}" for s in SPARSITIES), "seconds"]
    return markdown_table(head, lines)


def _accuracies(row: Row, result: str) -> Iterator[str]:
    for sparsity in map(str, SPARSITIES):
        if sparsity not in row[result]:
            yield "–"
            continue
        emptied = row["emptied"][sparsity].mean
        mark = f" ({emptied:.2g})" if emptied else ""
        yield f"{row[result][sparsity].mean:.3f}{mark}"


def figure(rows: Sequence[Row]) -> Figure:
    networks = _networks(rows, "accuracy")
    result = Figure(figsize=(4.2 * 3, 3.4 * len(networks)), layout="constrained", dpi=90)
    panels = result.subplots(len(networks), 3, squeeze=False, sharey="row")
    for line, (name, chosen) in zip(panels, networks.items(), strict=True):
        for axes, blocking in zip(line, BLOCKINGS, strict=True):
            for row in chosen:
                if row["blocking"] in (blocking, "searched"):
                    accuracy = row["reestimated"] or row["accuracy"]
                    points = [(100 * float(s), a.mean) for s, a in accuracy.items()]
                    style = {"ALDS": "k--", "ALDS, √k": "k:"}.get(row["score"], "o-")
                    axes.plot(*zip(*points, strict=True), style, label=row["score"], markersize=3)
            axes.axhline(chosen[0]["dense"].mean, color="0.6", linewidth=1)
            axes.set(xlabel="sparsity, %", title=f"{name}\nblocking: {blocking}")
            axes.title.set_fontsize(9)
        line[0].set_ylabel("accuracy")
        line[0].legend(frameon=False, fontsize=7)
    return result
