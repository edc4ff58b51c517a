"""Error of a layer as a function of cost, fitted at a few densities and interpolated."""

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
from matfact.operators._encoding import stored_nbytes

#: Method name for a layer that is kept.
DENSE = "dense"
#: Share by which the bytes of positions and scales are raised between two measured densities.
_RAISED = 0.05


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to store and apply one layer.

    Attributes
    ----------
    method : str
        Name of the method; ``"dense"`` for a kept layer.
    density : float
        Requested stored values ÷ entries, or NaN for the default and for methods without a density.
    error : float
        Relative error; of the layer's outputs if measured with inputs.
    nbytes : int
        Bytes of values and positions in files, without headers.
    flops : int
        Floating-point operations per sample.
    seconds : float
        Measured time, or NaN.
    bits : float or None
        Bits of the method, if it has any, else of quantized values; None for floating-point values.
    """

    method: str
    density: float
    error: float
    nbytes: int
    flops: int
    seconds: float = math.nan
    bits: float | None = None


def measure_options(
    W: Array,
    methods: Mapping[str, BaseFactorizer],
    densities: Sequence[float],
    *,
    gram: Array | None = None,
    latency: Callable[[FactorProduct], float] | None = None,
) -> list[Option]:
    """Fit every method at every density, and list the costs and errors.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        The layer's weights.
    methods : mapping of str to BaseFactorizer
        Unfitted estimators by name; each is cloned and set to the density.
    densities : sequence of float
        Stored values ÷ entries, each in (0, 1].
    gram : array of shape (in_features, in_features), optional
        ``XᵀX`` of the layer's inputs, for errors of its outputs.
    latency : callable, optional
        Returns the seconds of an operator, such as `apply_seconds`.

    Returns
    -------
    list of Option
        The dense layer, then one option per fit. Densities too small for a method are skipped.
    """
    W = check_matrix(W, "W")
    for density in densities:
        metrics.check_density(density)
    for name, estimator in methods.items():
        if not estimator.has_density:
            raise ValueError(f"methods must have a density to choose, got {name}={estimator}.")
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
    nbytes = sum(map(stored_nbytes, operator.factors))
    return Option(method, float(density), error, nbytes, operator.flops, seconds)


def interpolate(options: Sequence[Option], densities: Iterable[float]) -> list[Option]:
    """Add interpolated options at further densities to `options`.

    The logarithm of the error and the time are assumed to be linear in the density. FLOPs and bytes
    are upper bounds, with all values allowed by the density and the larger size of the positions
    and scales of both neighbours, raised by a twentieth, since codes of positions are not
    monotonic. Only options with the same bits are interpolated.

    Parameters
    ----------
    options : sequence of Option
        Measured options of one layer, including the dense layer.
    densities : iterable of float
        Further densities. Those outside a method's range, or already measured, add nothing.

    Returns
    -------
    list of Option
        All options.
    """
    dense = next(option for option in options if option.method == DENSE)
    by_method: dict[tuple[str, float | None], list[Option]] = {}
    known = [option for option in options if not math.isnan(option.density)]
    for option in sorted(known, key=lambda option: option.density):
        by_method.setdefault((option.method, option.bits), []).append(option)
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
    itemsize = dense.nbytes // entries if low.bits is None else low.bits / 8
    nnz = metrics.part_of(entries, density)
    others = max(option.nbytes - itemsize * (option.flops // 2) for option in (low, high))
    nbytes = math.ceil(itemsize * nnz + (1 + _RAISED) * others)
    if min(low.error, high.error) > 0:
        error = low.error ** (1 - share) * high.error**share
    else:
        error = (1 - share) * low.error + share * high.error
    seconds = (1 - share) * low.seconds + share * high.seconds
    return Option(low.method, density, error, nbytes, 2 * nnz, seconds, low.bits)


def apply_seconds(operator: FactorProduct, *, batch: int = 1, repeats: int = 9) -> float:
    """Return the median time of applying `operator` to `batch` samples, on its device.

    Parameters
    ----------
    operator : FactorProduct
        The product to time, after one warm-up.
    batch : int, default=1
        Number of samples per application.
    repeats : int, default=9
        Number of timed applications.
    """
    values = operator.factors[0].values
    samples = np.random.RandomState(0).standard_normal((operator.shape[1], batch))
    X = backend.like(samples, values, dtype=values.dtype)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.to_numpy((operator @ X)[:1, :1])  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
