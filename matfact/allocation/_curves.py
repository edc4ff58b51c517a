"""What a layer loses at each cost, by method: fitted at a few densities, interpolated between."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from sklearn.base import clone

from matfact import backend, metrics
from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._validation import check_matrix
from matfact.operators import DenseFactor, FactorProduct

#: The method of the option to leave a layer as it is.
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to store and apply one layer.

    Attributes
    ----------
    method : str
        Name of the method, ``"dense"`` for the layer as it is.
    density : float
        Stored values ÷ entries asked for.
    error : float
        Relative error, of the layer's outputs where it was measured on inputs.
    nbytes : int
        Bytes of values and of positions, each factor in the smaller of CSR and bit mask.
    flops : int
        Floating point operations for one sample.
    seconds : float
        Measured time, NaN where it was not.
    """

    method: str
    density: float
    error: float
    nbytes: int
    flops: int
    seconds: float = math.nan


def measure_options(
    W: Array,
    methods: Mapping[str, BaseFactorizer],
    densities: Sequence[float],
    *,
    gram: Array | None = None,
    latency: Callable[[FactorProduct], float] | None = None,
) -> list[Option]:
    """Fit every method at every density, and list what each result costs and loses.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        The layer's weights.
    methods : mapping of str to BaseFactorizer
        Unfitted estimators by name; each is cloned and given the density.
    densities : sequence of float
        Stored values ÷ entries, each in (0, 1].
    gram : array of shape (in_features, in_features), optional
        ``XᵀX`` of the layer's inputs, for errors of its outputs.
    latency : callable, optional
        Returns the seconds an operator takes, as :func:`apply_seconds` does.

    Returns
    -------
    list of Option
        The layer as it is, then one for each fit. Densities too small for a method are left out.
    """
    W = check_matrix(W, "W")
    for density in densities:
        metrics.check_density(density)
    options = [_option(W, FactorProduct([DenseFactor(W)]), DENSE, 1.0, gram, latency)]
    for name, estimator in methods.items():
        for density in densities:
            fitted = clone(estimator).set_params(density=density)
            try:
                operator = fitted.fit(W).operator_
            except metrics.DensityTooSmall:
                continue
            options.append(_option(W, operator, name, density, gram, latency))
    return options


def _option(
    W: Array,
    operator: FactorProduct,
    method: str,
    density: float,
    gram: Array | None,
    latency: Callable[[FactorProduct], float] | None,
) -> Option:
    W_hat = operator.toarray()
    is_blind = gram is None
    error = metrics.relative_error(W, W_hat) if is_blind else metrics.layer_error(W, W_hat, gram)
    seconds = math.nan if latency is None else latency(operator)
    nbytes = operator.nbytes("smallest")
    return Option(method, float(density), error, nbytes, operator.flops, seconds)


def interpolate(options: Sequence[Option], densities: Iterable[float]) -> list[Option]:
    """Return `options` and, for each method, what to expect at further densities between its own.

    The logarithm of the error and the seconds are taken to be linear in the density. FLOPs and
    bytes are ceilings: every value that the density allows, and the positions of whichever
    neighbour has more.

    Parameters
    ----------
    options : sequence of Option
        As measured for one layer, the layer as it is included.
    densities : iterable of float
        Densities wanted; those outside a method's own, or among them, add nothing to it.

    Returns
    -------
    list of Option
        All of them.
    """
    dense = next(option for option in options if option.method == DENSE)
    by_method: dict[str, list[Option]] = {}
    for option in sorted(options, key=lambda option: option.density):
        by_method.setdefault(option.method, []).append(option)
    between = [
        _between(low, high, density, dense)
        for density in densities
        for points in by_method.values()
        for low, high in itertools.pairwise(points)
        if low.density < density < high.density
    ]
    return [*options, *between]


def _between(low: Option, high: Option, density: float, dense: Option) -> Option:
    share = (density - low.density) / (high.density - low.density)
    entries = dense.flops // 2
    itemsize = dense.nbytes // entries
    nnz = metrics.part_of(entries, density)
    positions = max(option.nbytes - itemsize * (option.flops // 2) for option in (low, high))
    if min(low.error, high.error) > 0:
        error = low.error ** (1 - share) * high.error**share
    else:
        error = (1 - share) * low.error + share * high.error
    seconds = (1 - share) * low.seconds + share * high.seconds
    return Option(low.method, density, error, itemsize * nnz + positions, 2 * nnz, seconds)


def apply_seconds(operator: FactorProduct, *, batch: int = 1, repeats: int = 9) -> float:
    """Return the median time of applying `operator` to `batch` samples, where its values live.

    Parameters
    ----------
    operator : FactorProduct
        What is timed, after one application that does not count.
    batch : int, default=1
        Samples applied at a time.
    repeats : int, default=9
        Applications timed.
    """
    values = operator.factors[0].values
    samples = np.random.RandomState(0).standard_normal((operator.shape[1], batch))
    X = backend.like(samples, values, dtype=values.dtype)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.to_numpy((operator @ X)[:1, :1])  # which waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
