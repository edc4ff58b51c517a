"""Every factorizer at the same bytes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import clone

from matfact import metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import BaseFactorizer
from matfact.factorizers._quantized import Quantized
from matfact.operators import FactorProduct, QuantizedFactor
from matfact.operators._quantized import group_bounds

#: Bits of values that are tried, and sizes of groups where a matrix is only quantized.
VALUE_BITS = (3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, 256)
#: Share of the bits that may be left unused when a density is looked for, or exceeded by tables
#: of levels; and steps to find a density.
TOLERANCE, STEPS = 0.005, 12


def fit_at_bits(
    estimator: BaseFactorizer,
    W: Array,
    bits: float,
    *,
    calibration: InputStatistics | None = None,
) -> BaseFactorizer:
    """Fit a factorizer so that its product takes `bits` bits a weight, half a percent more at most.

    Factorizers with a parameter `bits` get it. All others are quantized: for a few bits of a value
    the largest density that fits is looked for, and the best of these fits is returned.

    Parameters
    ----------
    estimator : BaseFactorizer
        Unfitted; kept as it is.
    W : array of shape (out_features, in_features)
        The matrix.
    bits : float
        Bits of all that is stored ÷ entries of the matrix.
    calibration : InputStatistics, optional
        The layer's inputs. With them the error of outputs is what counts, and factorizers that
        cannot use inputs have theirs taken into account by `Quantized`.

    Returns
    -------
    BaseFactorizer
        The fitted estimator.

    Raises
    ------
    DensityTooSmall
        If so few bits do not suffice.
    ValueError
        If `bits` are not in (0, 16].
    """
    check_bits(bits)
    fits: list[BaseFactorizer] = []
    reason = ""
    for candidate in _candidates(estimator, W, bits):
        try:
            fits.append(_within(candidate, W, bits, calibration))
        except metrics.DensityTooSmall as error:
            reason = f": {error}"
    if not fits:
        raise metrics.DensityTooSmall(
            f"bits={bits:g} are too few for {type(estimator).__name__} and a "
            f"{W.shape[0]}×{W.shape[1]} matrix{reason}"
        )
    return min(fits, key=lambda fitted: _error(fitted, W, calibration))


def check_bits(bits: object) -> None:
    """Raise ``ValueError`` for bits a weight that no file can have."""
    if isinstance(bits, bool) or not isinstance(bits, Real) or not 0 < float(bits) <= 16:
        raise ValueError(f"bits must be a number above 0 and at most 16, got {bits!r}.")


def _within(
    candidate: BaseFactorizer, W: Array, bits: float, calibration: InputStatistics | None
) -> BaseFactorizer:
    """Return the fit, at a lower density if its positions take more bits than expected."""
    uses = calibration is not None and candidate.uses_inputs
    while True:
        fitted = clone(candidate).fit(W, calibration=calibration if uses else None)
        share = bits / fitted.bits_per_weight_
        if share * (1 + TOLERANCE) >= 1:
            return fitted
        params = candidate.get_params()
        if "estimator__density" not in params:
            raise metrics.DensityTooSmall(f"it takes {fitted.bits_per_weight_:.4g}.")
        candidate.set_params(estimator__density=0.99 * share * params["estimator__density"])


def _error(fitted: BaseFactorizer, W: Array, calibration: InputStatistics | None) -> float:
    if calibration is None:
        return fitted.reconstruction_err_
    return metrics.layer_error(W, fitted.operator_.toarray(), calibration.gram)


def _candidates(estimator: BaseFactorizer, W: Array, bits: float) -> list[BaseFactorizer]:
    """Return unfitted estimators that should take the bits."""
    params = estimator.get_params(deep=False)
    if "group_size" in params and "density" not in params:
        return [_set(estimator, **chosen) for chosen in _groups(W.shape[1], bits)]
    if "density" not in params:
        return [_set(estimator, bits=bits)] if "bits" in params else [clone(estimator)]
    candidates = []
    for value_bits in VALUE_BITS:
        density = _density(estimator, W, bits, value_bits)
        if density is not None:
            candidates.append(Quantized(_set(estimator, density=density), bits=value_bits))
    return candidates


def _groups(columns: int, bits: float) -> list[dict[str, Any]]:
    """Return the bits and the sizes of groups of a quantized matrix that use the bits best."""
    sizes = [size for size in GROUP_SIZES if size < columns]
    pairs = [(b, g) for b in range(2, 9) for g in (*sizes, None) if b + 16 / (g or columns) <= bits]
    if not pairs:
        return []
    most = max(b for b, _ in pairs)
    # With as many bits, the smallest groups.
    return [{"bits": most, "group_size": next(g for b, g in pairs if b == most)}]


def _density(estimator: BaseFactorizer, W: Array, bits: float, value_bits: int) -> float | None:
    """Return the largest density at which values of so many bits fit, None if there is none."""
    quick = {"max_iter": 1} if "max_iter" in estimator.get_params(deep=False) else {}

    def taken(density: float) -> float:
        product = _set(estimator, density=density, **quick).fit(W).operator_
        return _quantized_bits(product, value_bits)

    best, low, high = None, 0.0, min(1.0, bits / value_bits)
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            fits = taken(middle) <= bits
            best = middle if fits else best
        except metrics.DensityTooSmall:
            fits = True  # a larger density may be large enough
        low, high = (middle, high) if fits else (low, middle)
        if high - low < TOLERANCE * high:
            break
    return best


def _quantized_bits(product: FactorProduct, bits: int) -> float:
    """Return the bits a weight of a product with values of so many bits, whatever these are."""
    factors = []
    for factor in product:
        if math.prod(factor.values.shape):
            n_groups = len(group_bounds(factor, 64)) - 1
            levels = np.zeros(factor.values.shape, np.int8)
            factor = QuantizedFactor(levels, np.ones(n_groups, np.float32), bits, 64, factor)
        factors.append(factor)
    levels = 8 * len(factors) * 2**bits / math.prod(product.shape)
    return FactorProduct(factors).bits_per_weight + levels


def _set(estimator: BaseFactorizer, **params: Any) -> BaseFactorizer:
    return clone(estimator).set_params(**params)
