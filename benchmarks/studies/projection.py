"""Projections of trained matrices (Boža & Macko 2025, Figs. 3–6).

Which method comes closest at a quarter of the values, how iterations and annealing matter to
double sparse factorization, how many values its first factor should take, and where it should
start. Squares of several sizes are cut out of the layers of a trained sentence transformer;
each seed takes other layers. Errors are ÷ that of magnitude pruning to as many values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import label_lines
from benchmarks.harness import Row, Spread
from benchmarks.methods import BASELINES, OURS, Factors, Method
from benchmarks.peers import PEERS
from benchmarks.projection import evaluate
from benchmarks.tables import markdown_table
from matfact import DoubleSparseFactorizer
from matfact.compare._weights import load_weights

SEEDS = 2
#: By the names in tables. The published procedure is a transcription from the paper.
METHODS = (
    "matfact DSF", "published DSF", "matfact Palm4MSA", "pyfaust palm4msa", "matfact LowRank",
    "matfact MonarchProjector", "lazylinop ksd (Monarch)", "matfact BlockSVD",
)  # fmt: skip
#: Sizes of the first part, and of those that the published procedure is run for many times.
SIZES, SMALLER = (64, 256, 1024), (64, 256)
#: From this size on a cell takes up to a minute, and there are fewer seeds.
LARGE = 1024
#: Iterations of the published procedure, whether the first penalty of each solve is annealed;
#: and sweeps of ours.
SETTINGS = {
    "published, 40×5": {"outer": 40, "inner": 5},
    "published, 20×10": {"outer": 20, "inner": 10},
    "published, 40×5, not annealed": {"outer": 40, "inner": 5, "anneal": False},
    "matfact, 25 sweeps": {"max_iter": 25},
    "matfact, 100 sweeps": {"max_iter": 100},
    "matfact, 400 sweeps": {"max_iter": 400},
}
STARTS = ("identity", "Gaussian", "sparse Gaussian", "singular vectors")
#: Total density, and densities of the first factor, of Fig. 5.
TOTAL, FIRST = 0.4, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
DENSITY = 0.25
#: Name of a kind of layer, which is whole, in the part on the first factor.
ATTENTION_OUTPUT = "attention.output.dense"


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    for size in (32,) if quick else SIZES:
        for method in METHODS:
            if size < LARGE or method != "pyfaust palm4msa":
                yield from _seeded({"part": "methods", "size": size, "method": method})
    for size in (32,) if quick else SMALLER:
        for setting in SETTINGS:
            yield {"part": "settings", "size": size, "setting": setting}
        for start in STARTS:
            yield {"part": "starts", "size": size, "start": start}
    for first in FIRST[::3] if quick else FIRST:
        for by in ("matfact", "published"):
            yield {"part": "first factor", "size": 64 if quick else 256, "first": first, "by": by}


def _seeded(cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a cell that takes all seeds, or a cell for each of two where it is large."""
    if cell["size"] < LARGE:
        yield cell
    else:
        yield from ({**cell, "seed": seed} for seed in range(2))


def run(cell: dict[str, Any]) -> dict[str, Any]:
    size, seed = cell["size"], cell["seed"]
    if cell["part"] == "first factor":
        W = square(size, seed, ATTENTION_OUTPUT)
        factors = first_factor(W, cell["first"], cell["by"])
    else:
        W = square(size, seed)
        if cell["part"] == "methods":
            method = _methods()[cell["method"]]
            if not method.is_present():
                return {"absent": 1}
            factors = method.fit(W, DENSITY)
        elif cell["part"] == "settings":
            factors = with_setting(W, SETTINGS[cell["setting"]])
        else:
            factors = _published(W, DENSITY, start=starting_point(cell["start"], W, seed))
    found = evaluate(W, factors())
    return {name: found[name] for name in ("normalized_error", "relative_error", "density")}


def square(size: int, seed: int, kind: str = "layer") -> np.ndarray:
    """Return a square out of a layer, another for each seed; out of several if it is large.

    Layers are taken in turns, so that seeds meet different kinds; wide ones are put side by side.
    """
    weights = load_weights()
    names = [name for name in weights if kind in name and "embedding" not in name]
    large = [name for name in names if min(weights[name].shape) >= size]
    if large:
        W = weights[large[(1 + 5 * seed) % len(large)]]  # five: no number of kinds of layers
    else:
        tall = [weights[name] for name in names if weights[name].shape[0] >= size]
        n_needed = -(-size // tall[0].shape[1]) if tall else 0
        if len(tall) < n_needed or not tall:
            raise ValueError(f"size={size} is too large for the layers of {weights.source}.")
        W = np.concatenate([tall[(seed + i) % len(tall)] for i in range(n_needed)], axis=1)
    return np.ascontiguousarray(W[:size, :size], dtype=np.float32)


@functools.cache
def _methods() -> dict[str, Method]:
    return {method.name: method for method in (*OURS, *BASELINES, *PEERS)}


def with_setting(W: np.ndarray, setting: dict[str, Any]) -> Factors:
    """Factorize with the published procedure or with ours."""
    if "max_iter" not in setting:
        return _published(W, DENSITY, **setting)
    model = DoubleSparseFactorizer(DENSITY, **setting).fit(W)
    return lambda: [factor.toarray() for factor in model.factors_]


def first_factor(W: np.ndarray, first: float, by: str) -> Factors:
    """Factorize at the total density of Fig. 5."""
    if by == "published":
        return _published(W, TOTAL, first_factor_density=first)
    model = DoubleSparseFactorizer(TOTAL, first_factor_density=first).fit(W)
    return lambda: [factor.toarray() for factor in model.factors_]


def starting_point(name: str, W: np.ndarray, seed: int) -> np.ndarray:
    """Return the first factor that the published procedure starts from."""
    side, rng = len(W), np.random.RandomState(seed)
    if name == "identity":
        start = np.eye(side)
    elif name == "singular vectors":
        start = np.linalg.svd(W)[0]
    else:
        start = rng.standard_normal((side, side)) / side**0.5
        if name == "sparse Gaussian":
            start *= rng.random_sample(start.shape) < 0.16  # what it is to end with
    return start.astype(W.dtype)


def _published(
    W: np.ndarray, density: float, start: np.ndarray | None = None, **setting: Any
) -> Factors:
    import torch

    from benchmarks.published_dsf import published_dsf

    first = None if start is None else torch.from_numpy(start)
    *_, factors = published_dsf(torch.from_numpy(W), density, start=first, **setting)
    return lambda: [factor.numpy() for factor in factors]


#: For each part, what tells its cells apart and the title of its panel.
PARTS = {
    "methods": ("method", f"Fig. 3: methods, {DENSITY:.0%} of the values"),
    "settings": ("setting", "Fig. 4: settings of double sparse factorization"),
    "first factor": ("by", f"Fig. 5: density of the first factor, {TOTAL:.0%} of the values"),
    "starts": ("start", "Fig. 6: starts of the published procedure"),
}


def table(rows: Sequence[Row]) -> str:
    sections = []
    for part, (name, title) in PARTS.items():
        chosen = [row for row in rows if row["part"] == part and "absent" not in row.results]
        axis = "first" if part == "first factor" else "size"
        columns = sorted({row[axis] for row in chosen})
        lines = [
            [label, *(_cell(chosen, {name: label, axis: column}) for column in columns)]
            for label in dict.fromkeys(row[name] for row in chosen)
        ]
        head = "density" if axis == "first" else axis
        sections.append(f"### {title}\n\n{markdown_table([f'{name}, by {head}', *columns], lines)}")
    return "\n".join(sections)


def _cell(rows: Iterable[Row], wanted: dict[str, Any]) -> str:
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return f"{row['normalized_error']:.3f}"
    return "–"


def figure(rows: Sequence[Row]) -> Figure:
    result = Figure(figsize=(10, 7.5), layout="constrained", dpi=100)
    for axes, (part, (name, title)) in zip(result.subplots(2, 2).flat, PARTS.items(), strict=True):
        chosen = [row for row in rows if row["part"] == part and "absent" not in row.results]
        axis = "first" if part == "first factor" else "size"
        for label in dict.fromkeys(row[name] for row in chosen):
            line = sorted((row[axis], *_bar(row)) for row in chosen if row[name] == label)
            x, y, deviation = zip(*line, strict=True)
            axes.errorbar(x, y, deviation, capsize=2, markersize=4, label=label)
        if axis == "size":
            axes.set_xscale("log", base=2)
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set(title=title, ylabel="error ÷ magnitude pruning")
        axes.set_xlabel("density of the first factor" if axis == "first" else "side of the matrix")
        label_lines(axes)
    return result


def _bar(row: Row) -> tuple[float, float]:
    spread: Spread = row["normalized_error"]
    return spread.mean, spread.deviation
