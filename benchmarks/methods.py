"""Methods: the estimators of this library, the published baseline and truncated SVD."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import matfact.factorizers
from benchmarks import machine
from matfact import backend
from matfact.constraints import RowColumnSparsity
from matfact.operators import Factor, SelectionFactor

#: Densifies the factors of a finished fit; not timed. A boolean factor stands for a permutation
#: or a crop that is kept as indices and stores no value.
Factors = Callable[[], list[np.ndarray]]
#: Seconds and relative error after each iteration of one fit.
Trace = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the benchmark.

    Attributes
    ----------
    name : str
        Name in tables.
    family : str
        Table in which the method is compared.
    fit : callable
        ``fit(W, density, **setting)`` returns the factors. Only this call is timed.
    is_present : callable
        Whether its requirements are installed.
    suits : callable
        Whether it supports a matrix.
    largest : int or None
        Side of the largest square matrix that takes minutes at most.
    sweep : (str, tuple), optional
        Parameter that trades error for time, and its values.
    trace : callable, optional
        ``trace(W, density)`` returns the progress of one fit.
    """

    name: str
    family: str
    fit: Callable[..., Factors]
    is_present: Callable[[], bool] = lambda: True
    suits: Callable[[np.ndarray], bool] = np.isrealobj
    largest: int | None = None
    sweep: tuple[str, tuple[Any, ...]] | None = None
    trace: Callable[[np.ndarray, float], Trace] | None = None


def is_power_of_two(W: np.ndarray) -> bool:
    """Whether `W` is square with a power of two as its side."""
    return W.shape[0] == W.shape[1] and W.shape[0].bit_count() == 1


def is_hadamard(W: np.ndarray) -> bool:
    """Whether `W` is square, of a power of two, with entries ±1."""
    return is_power_of_two(W) and np.isrealobj(W) and bool((np.abs(W) == 1).all())


def ours(name: str, family: str, estimator: str, **options: Any) -> Method:
    """Return the entry of the estimator class called `estimator`, which need not exist yet.

    Fields of `Method` among `options` are set there; the rest goes to the estimator,
    functions being called with the matrix first.
    """
    fields = {f.name for f in dataclasses.fields(Method)} & set(options)
    entry = {field: options.pop(field) for field in fields}

    def fitted(W: np.ndarray, density: float, **setting: Any) -> Any:
        parameters = {k: v(W) if callable(v) else v for k, v in options.items()} | setting
        model = getattr(matfact.factorizers, estimator)(**parameters)
        if family != "butterfly":  # whose supports say how many values are stored
            model.set_params(density=density)
        return model.fit(W)

    def fit(W: np.ndarray, density: float, **setting: Any) -> Factors:
        model = fitted(W, density, **setting)
        return lambda: [densify(factor) for factor in model.factors_]

    def trace(W: np.ndarray, density: float) -> Trace:
        history = fitted(W, density).history_
        scale = 2.0 ** math.floor(math.log2(np.abs(W).max()))  # objectives are those of W ÷ scale
        energy = np.linalg.norm(W.astype(np.float64) / scale) ** 2
        errors = [math.sqrt(max(0.0, value) / energy) for value in history["objective"]]
        return list(zip(history["seconds"], errors, strict=True))

    def is_present() -> bool:
        return hasattr(matfact.factorizers, estimator)

    if entry.get("sweep"):
        entry["trace"] = trace
    return Method(f"matfact {name}", family, fit, is_present=is_present, **entry)


def densify(factor: Factor) -> np.ndarray:
    dense = backend.to_numpy(factor.toarray())
    return dense != 0 if isinstance(factor, SelectionFactor) else dense


def truncated_svd(W: np.ndarray, density: float) -> Factors:
    """Keep the largest rank that fits the density, out of a full decomposition."""
    rank = int(density * W.size / sum(W.shape))
    left, values, right = np.linalg.svd(W, full_matrices=False)
    factors = [left[:, :rank] * values[:rank], right[:rank]]
    return lambda: factors


def magnitude(W: np.ndarray, density: float) -> Factors:
    """Keep the largest entries."""
    budget = int(density * W.size)
    kept = np.argpartition(-np.abs(W), budget - 1, axis=None)[:budget]
    pruned = np.zeros_like(W)
    pruned.flat[kept] = W.flat[kept]
    return lambda: [pruned]


def published(W: np.ndarray, density: float, outer: int = 40) -> Factors:
    """Run the published baseline."""
    import torch

    from benchmarks.published_dsf import published_dsf

    *_, factors = published_dsf(torch.from_numpy(W), density, outer=outer)
    return lambda: [factor.numpy() for factor in factors]


def published_trace(W: np.ndarray, density: float) -> Trace:
    """Trace the published baseline, without counting the time to evaluate its error."""
    import torch

    from benchmarks.published_dsf import published_dsf

    target = W.astype(np.float64)
    iterates = published_dsf(torch.from_numpy(W), density)
    trace, seconds = [], 0.0
    while True:
        start = time.perf_counter()
        factors = next(iterates, None)
        seconds += time.perf_counter() - start
        if factors is None:
            return trace
        left, right = (factor.double().numpy() for factor in factors)
        error = np.linalg.norm(target - left @ right) / np.linalg.norm(target)
        trace.append((seconds, float(error)))


OURS = (
    ours(
        "DSF", "double sparse", "DoubleSparseFactorizer", sweep=("max_iter", (5, 10, 20, 40, 100))
    ),
    ours("Palm4MSA", "double sparse", "Palm4MSA", sweep=("max_iter", (10, 30, 100, 300))),
    ours("MonarchProjector", "block", "MonarchProjector"),
    ours("BlockSVD", "block", "BlockSVD"),
    ours("LowRank", "low rank", "LowRank"),
    ours("MagnitudePruner", "low rank", "MagnitudePruner"),
    ours(
        "ButterflyFit", "butterfly", "ButterflyFit", suits=is_power_of_two,
        permutation=lambda W: "bit_reversal" if np.iscomplexobj(W) else "identity",
    ),
    ours(
        "ButterflyFit, any permutation", "butterfly", "ButterflyFit", suits=is_power_of_two,
        permutation="auto",
    ),
    ours(
        "Palm4MSA, hierarchical", "butterfly", "Palm4MSA", suits=is_hadamard, hierarchical="left",
        constraints=lambda W: [RowColumnSparsity(2)] * (len(W).bit_length() - 1),
        residual_constraints=lambda W: [
            RowColumnSparsity(len(W) >> i) for i in range(1, len(W).bit_length() - 2)
        ],
    ),
)  # fmt: skip

BASELINES = (
    Method(
        "published DSF", "double sparse", published,
        is_present=lambda: machine.is_installed("torch"),
        sweep=("outer", (5, 10, 20, 40, 100)), trace=published_trace,
    ),
    Method("truncated SVD (NumPy)", "low rank", truncated_svd),
    Method("magnitude (NumPy)", "low rank", magnitude),
)  # fmt: skip
