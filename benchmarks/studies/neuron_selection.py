"""Fewer hidden units (Walia et al.): i-SpaSP, its gradient variant, and the closed form.

On synthetic activations whose rows fade as ``i^(−1/p)``, the error of the block's outputs at
every number of units. On networks of one hidden layer that are trained here, the same, and the
accuracy before and after fine-tuning. And the time of one gradient: from second moments, as all
methods here take it, and by automatic differentiation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import Row
from benchmarks.tables import markdown_table
from matfact.calibration import OutputStatistics
from matfact.solvers import cosamp
from matfact.solvers.quadratic import quadratic

SEEDS = 3
METHODS = {
    "ispasp": "i-SpaSP", "gradient": "gradient variant", "least_squares": "closed form",
}  # fmt: skip
COMPRESSIBILITY = (0.3, 0.5, 0.7, 0.9)
#: Iterations, as in the paper.
MAX_ITER = 20
#: The closed form is to be better than i-SpaSP by this factor…
GAIN = 0.8
#: …wherever i-SpaSP leaves an error above this: on synthetic activations more than rounding, and
#: in networks, where units that hardly fire are the last to go, more than hardly anything.
NEGLIGIBLE = {"synthetic": 1e-6, "network": 0.01}
#: Relative errors come from squares; below this they are rounding.
ROUNDING = 1e-7
#: Data set, images of it to train with at most, hidden units, and epochs.
NETWORKS = (
    ("digits", 2000, 100, 30),
    ("mnist", 10_000, 256, 12),
    ("fashion-mnist", 10_000, 256, 12),
)
#: Shares of the hidden units at which accuracy is measured.
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    for n_hidden in (30,) if quick else (100, 200):
        for p in COMPRESSIBILITY:
            yield {"part": "synthetic", "p": p, "hidden": n_hidden}
    for data, images, n_hidden, epochs in NETWORKS[:1] if quick else NETWORKS:
        yield {
            "part": "network", "data": data, "images": images, "hidden": 50 if quick else n_hidden,
            "epochs": epochs, "tuning": 3,
        }  # fmt: skip
    for n_hidden in (100,) if quick else (256, 1024):
        samples = 2000 if quick else 10_000
        yield {"part": "seconds", "samples": samples, "hidden": n_hidden, "seed": 0}


def run(cell: dict[str, Any]) -> dict[str, Any]:
    if cell["part"] == "synthetic":
        return curves(synthetic(cell["p"], cell["hidden"], cell["seed"]), NEGLIGIBLE["synthetic"])
    return network(cell) if cell["part"] == "network" else seconds(cell)


def synthetic(
    p: float, n_hidden: int, seed: int, n_samples: int = 400, n_outputs: int = 20
) -> OutputStatistics:
    """Return moments of activations that are compressible as Sec. 5.3.2 asks, in random order."""
    rng = np.random.RandomState(seed)
    H = rng.rand(n_samples, n_hidden) * np.arange(1.0, n_hidden + 1) ** (-1.0 / p)
    H = H[:, rng.permutation(n_hidden)]
    return OutputStatistics().update(H, H @ rng.randn(n_hidden, n_outputs))


def curves(
    moments: OutputStatistics, negligible: float, *, with_bias: bool = False
) -> dict[str, Any]:
    """Return the relative error of each method at every number of units, and how they compare.

    They are compared where i-SpaSP's error is not `negligible`. `with_bias`, the closed form
    re-solves the biases of the outputs too, as it does in a network.
    """
    n_hidden = moments.inputs.gram.shape[0]
    sizes = range(1, n_hidden + 1)
    fitted = moments.centered() if with_bias else moments
    scale = (fitted.energy / moments.energy) ** 0.5
    errors = {
        "ispasp": [cosamp.ispasp(moments, s, MAX_ITER).error ** 0.5 for s in sizes],
        "gradient": [cosamp.gradient(moments, s, MAX_ITER).error ** 0.5 for s in sizes],
        "least_squares": [
            scale * selection.error**0.5
            for selection in cosamp.selection_path(fitted, sizes, MAX_ITER)
        ],
    }
    ratios = {
        str(size): ours / published
        for size, ours, published in zip(
            sizes, errors["least_squares"], errors["ispasp"], strict=True
        )
        if published > negligible
    }
    by_size = {m: dict(zip(map(str, sizes), e, strict=True)) for m, e in errors.items()}
    return {
        "error": by_size,
        "largest_ratio": max(ratios.values()),
        "median_ratio": statistics.median(ratios.values()),
        "compared": len(ratios),
        "above": {size: ratio for size, ratio in ratios.items() if ratio > GAIN},
    }


def least_errors(moments: OutputStatistics) -> dict[str, float]:
    """Return the least error that one unit, and that two units, can have: all are tried."""
    problem, _ = quadratic(moments.centered()).normalized()
    products = problem.cross @ problem.cross.T
    gains, angles = np.diagonal(products), problem.gram - np.diag(np.diagonal(problem.gram))
    parallel = np.abs(angles) > 1.0 - 1e-9  # two such units are one
    of_pairs = gains[:, None] + gains[None, :] - 2.0 * angles * products
    of_pairs = np.where(parallel, 0.0, of_pairs / np.where(parallel, 1.0, 1.0 - angles**2))
    np.fill_diagonal(of_pairs, 0.0)
    unexplained = {"1": problem.energy - gains.max(), "2": problem.energy - of_pairs.max()}
    share = moments.centered().energy / moments.energy
    return {size: (share * left / problem.energy) ** 0.5 for size, left in unexplained.items()}


def network(cell: dict[str, Any]) -> dict[str, Any]:
    """Train a network of one hidden layer, and leave it fewer units with each method."""
    import torch

    from benchmarks.networks.data import load
    from benchmarks.networks.training import accuracy, train
    from matfact.torch.neurons import prune_neurons

    images, labels, *test = load(cell["data"])
    images, labels = images[: cell["images"]], labels[: cell["images"]]
    torch.manual_seed(cell["seed"])
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), cell["hidden"]), torch.nn.ReLU(),
        torch.nn.Linear(cell["hidden"], 10),
    )  # fmt: skip
    train(model, images, labels, seed=cell["seed"], epochs=cell["epochs"])
    batches = list(images.split(1024))
    moments = moments_of(model, batches)
    result = curves(moments, NEGLIGIBLE["network"], with_bias=True)
    result |= {"least": least_errors(moments), "dense": accuracy(model, *test)}
    result |= {"before": {}, "after": {}}
    for method in METHODS:
        before, after = {}, {}
        for n_units in sorted({max(1, round(share * cell["hidden"])) for share in SHARES}):
            pruned = prune_neurons(model, batches, n_units, method=method, max_iter=MAX_ITER).model
            before[str(n_units)] = accuracy(pruned, *test)
            tuning = {"epochs": cell["tuning"], "learning_rate": 0.01}
            train(pruned, images, labels, seed=cell["seed"], **tuning)
            after[str(n_units)] = accuracy(pruned, *test)
        result["before"][method], result["after"][method] = before, after
    return result


def moments_of(model: Any, inputs: Sequence[Any]) -> OutputStatistics:
    """Return the moments of the hidden layer and of the outputs less their bias."""
    import torch

    moments = OutputStatistics()
    with torch.no_grad():
        for x in inputs:
            hidden = model[:-1](x).numpy()
            moments.update(hidden, hidden @ model[-1].weight.numpy().T)
    return moments


def seconds(cell: dict[str, Any], n_outputs: int = 10) -> dict[str, Any]:
    """Time the gradient of the error by the output weights, and the moments it is made of."""
    import torch

    rng = np.random.RandomState(cell["seed"])
    n_hidden = cell["hidden"]
    H = np.maximum(rng.standard_normal((cell["samples"], n_hidden)), 0.0)
    U = H @ rng.standard_normal((n_hidden, n_outputs))
    problem = quadratic(OutputStatistics().update(H, U))
    weights = rng.standard_normal((n_hidden, n_outputs))
    activations, outputs = torch.from_numpy(H), torch.from_numpy(U)
    variable = torch.from_numpy(weights).requires_grad_()

    def by_autograd() -> None:
        loss = 0.5 * (activations @ variable - outputs).square().sum()
        torch.autograd.grad(loss, variable)

    def by_moments() -> None:
        _ = problem.gram @ weights - problem.cross

    autograd, moments = fastest(by_autograd), fastest(by_moments)
    return {
        "autograd": autograd,
        "moments": moments,
        "faster": autograd / moments,
        "moments_built": fastest(lambda: OutputStatistics().update(H, U), repeats=3),
    }


def fastest(call: Callable[[], Any], repeats: int = 20) -> float:
    """Return the seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def table(rows: Sequence[Row]) -> str:
    parts = {
        name: [row for row in rows if row["part"] == name]
        for name in ("synthetic", "network", "seconds")
    }
    compared = (
        "largest closed form ÷ i-SpaSP", "median", "units compared",
        f"those above {GAIN}",
    )  # fmt: skip
    sections = [
        "### Synthetic activations: error of the outputs at a tenth, a quarter, half of the units",
        markdown_table(
            ["p", "hidden", *METHODS.values(), *compared],
            [[r["p"], r["hidden"], *_errors(r, (0.1, 0.25, 0.5)), *_ratios(r)]
             for r in parts["synthetic"]],
        ),
        "\n".join(_orders(parts["synthetic"])),
        "### Trained networks: error of the outputs at a tenth, a quarter, half of the units",
        markdown_table(
            ["data", "hidden", *METHODS.values(), *compared, "least possible at 1, 2 units"],
            [[r["data"], r["hidden"], *_errors(r, (0.1, 0.25, 0.5)), *_ratios(r), _least(r)]
             for r in parts["network"]],
        ),
        "### Accuracy before → after fine-tuning",
        markdown_table(["data", "units", *METHODS.values()], _accuracies(parts["network"])),
        "### Milliseconds of a gradient by the output weights",
        markdown_table(
            ["samples", "hidden", "automatic differentiation", "from moments", "faster",
             "building the moments"],
            [[r["samples"], r["hidden"], *(f"{1e3 * r[n].mean:.3g}" for n in TIMES[:2]),
              f"{r['faster'].mean:.0f}×", f"{1e3 * r['moments_built'].mean:.3g}"]
             for r in parts["seconds"]],
        ),
    ]  # fmt: skip
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def _orders(rows: Sequence[Row]) -> Iterator[str]:
    """Say at how many sizes the closed form's error is in the order of p."""
    for n_hidden in dict.fromkeys(row["hidden"] for row in rows):
        chosen = sorted((r for r in rows if r["hidden"] == n_hidden), key=lambda r: r["p"])
        curves = [row["error"]["least_squares"] for row in chosen]
        levels = [[curve[size].mean for curve in curves] for size in curves[0]]
        levels = [level for level in levels if max(level) > ROUNDING]
        ordered = sum(level == sorted(level) for level in levels)
        yield (
            f"- {n_hidden} units: the error of the closed form grows with p at {ordered} of "
            f"{len(levels)} sizes (where it is not rounding)."
        )


def _errors(row: Row, shares: Sequence[float]) -> Iterator[str]:
    """Yield, for each method, the mean errors at shares of the units."""
    for method in METHODS:
        errors = row["error"][method]
        chosen = (errors[str(max(1, round(share * row["hidden"])))].mean for share in shares)
        yield " / ".join(f"{error:.3g}" for error in chosen)


def _ratios(row: Row) -> tuple[str, ...]:
    return (
        f"{row['largest_ratio']:.2f}", f"{row['median_ratio']:.2f}",
        f"{row['compared'].mean:.0f} of {row['hidden']}",
        ", ".join(f"{size} ({ratio.mean:.2f})" for size, ratio in row["above"].items()) or "none",
    )  # fmt: skip


def _least(row: Row) -> str:
    """Return the ratio of the best selections, of all there are, to i-SpaSP's."""
    published = row["error"]["ispasp"]
    ratios = (left.mean / published[size].mean for size, left in row["least"].items())
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _accuracies(rows: Sequence[Row]) -> Iterator[list[str]]:
    for row in rows:
        yield [row["data"], f"all {row['hidden']}", f"{row['dense']:.3f}", "", ""]
        for size in row["before"]["ispasp"]:
            both = (f"{row['before'][m][size]:.3f} → {row['after'][m][size]:.3f}" for m in METHODS)
            yield [row["data"], size, *both]


def figure(rows: Sequence[Row]) -> Figure:
    result = Figure(figsize=(12, 3.8), layout="constrained", dpi=100)
    synthetic, networks, accuracies = result.subplots(1, 3)
    of_synthetic = [row for row in rows if row["part"] == "synthetic"]
    largest = max((row["hidden"] for row in of_synthetic), default=0)
    for row, colour in zip(
        [r for r in of_synthetic if r["hidden"] == largest], COLOURS, strict=False
    ):
        _curves(synthetic, row, colour, f"p = {row['p']}")
    of_networks = [row for row in rows if row["part"] == "network"]
    for row, colour in zip(of_networks, COLOURS, strict=False):
        _curves(networks, row, colour, row["data"])
    for row in of_networks[-1:]:
        for method, colour in zip(METHODS, COLOURS, strict=False):
            for when, style in (("before", ":"), ("after", "-")):
                points = [(int(size), s.mean) for size, s in row[when][method].items()]
                label = f"{METHODS[method]}, {when}"
                accuracies.plot(*zip(*points, strict=True), style, color=colour, label=label)
        accuracies.axhline(row["dense"].mean, color="0.6", linewidth=1)
        accuracies.set(title=f"{row['data']}: before, after tuning", ylabel="accuracy")
    synthetic.set_title(f"synthetic, {largest} units")
    networks.set_title("trained networks")
    for axes in (synthetic, networks):
        axes.set(yscale="log", ylim=(1e-4, 1.5), ylabel="relative error of the outputs")
    for axes in (synthetic, networks, accuracies):
        axes.set(xscale="log", xlabel="units kept")
        axes.legend(frameon=False, fontsize=7)
    return result


def _curves(axes: Any, row: Row, colour: str, label: str) -> None:
    """Draw the error of each method against the units kept."""
    for method, style in zip(METHODS, (":", "--", "-"), strict=True):
        points = [(int(size), spread.mean) for size, spread in row["error"][method].items()]
        name = f"{label}, {METHODS[method]}" if label.endswith(("0.3", "digits")) else None
        name = label if method == "least_squares" and name is None else name
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.2)


TIMES = ("autograd", "moments", "moments_built")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
