"""Double binary factorization."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar

from sklearn.utils._param_validation import Interval

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import BaseFactorizer, Factorization
from matfact.operators import Factor, KroneckerSparseFactor, SignFactor
from matfact.operators._rounding import rounded
from matfact.solvers._callback import History
from matfact.solvers.double_binary import BinaryProduct, double_binary, fit_outputs
from matfact.solvers.finalize import input_scale
from matfact.solvers.layerwise import caution

#: Bits of a scale, with its share of those of its group.
SCALE_BITS, GROUP = 8, 64
DEFAULT_BITS = 2.0


class DoubleBinaryFactorizer(BaseFactorizer):
    """Two matrices of signs between diagonal scales, ``W ≈ diag(a) S diag(m) T diag(b)``.

    Double binary factorization (Boža & Macko, 2025). An entry of `S` or `T` takes one bit, and
    applying them takes additions alone. Below about three bits a weight this is more accurate than
    rounding the weights; the inner dimension follows from the bits.

    Parameters
    ----------
    bits : float or None, default=None
        Bits a weight, scales included; never exceeded. A square matrix of `n` rows has an inner
        dimension of about ``bits * n / 2``. None means 2, or those of an inner dimension of 1
        where that is more.
    max_iter : int, default=150
        Number of sweeps over both matrices. The penalties are scheduled over them, so more sweeps
        find better signs: 300 lower the error by about 3 %.

    Attributes
    ----------
    operator_ : FactorProduct
        The five factors; scales are stored in 8 bits.
    factors_ : tuple of Factor
        ``diag(a)``, `S`, ``diag(m)``, `T` and ``diag(b)``.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``. It is infinite
        where there are as many signs as entries of `W`.
    layer_err_ : float
        ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for the calibration inputs `X`; only with calibration.
    nnz_ : int
        Signs and scales.
    density_ : float
        ``nnz_`` ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Number of sweeps.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry an iteration.
        The last flips and scales lower it once more.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    Quantized : Values of few bits in any factorization.

    References
    ----------
    - V. Boža, V. Macko, "Addition is almost all you need: compressing neural networks with
      double binary factorization", arXiv:2505.11076, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import DoubleBinaryFactorizer
    >>> W = np.random.default_rng(0).standard_normal((128, 128))
    >>> model = DoubleBinaryFactorizer(bits=2.0, max_iter=50).fit(W)
    >>> model.operator_[1], bool(model.reconstruction_err_ < 0.4)
    (SignFactor(128×116), True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "bits": [Interval(Real, 0, 16, closed="right"), None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(self, bits: float | None = None, max_iter: int = 150) -> None:
        self.bits = bits
        self.max_iter = max_iter

    def _factorize(self, W: Array, history: History) -> Factorization:
        product, n_iter = double_binary(
            W, self._n_terms(W.shape), max_iter=self.max_iter, callback=history
        )
        return Factorization(_factors(product, W, None), n_iter)

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        xp = backend.namespace(W)
        moment = calibration.damped(caution(calibration)).second_moment
        moment = moment / max(float(xp.mean(xp.linalg.diagonal(moment))), 1e-300)
        scale = xp.astype(input_scale(moment), W.dtype)
        metric = xp.astype(moment, W.dtype)
        product, n_iter = double_binary(
            W * scale[None, :],
            self._n_terms(W.shape),
            metric=metric / scale[:, None] / scale[None, :],
            max_iter=self.max_iter,
            callback=history,
        )
        product.b = product.b / scale
        return Factorization(_factors(product, W, metric), n_iter)

    def _n_terms(self, shape: tuple[int, int]) -> int:
        """Return the inner dimension that the bits allow."""
        bits = DEFAULT_BITS if self.bits is None else self.bits
        budget, sides = bits * math.prod(shape), sum(shape)

        def needed(terms: int) -> int:
            return terms * sides + _scale_bits(*shape, terms)

        terms = int((budget - _scale_bits(*shape)) // (sides + SCALE_BITS))
        while terms > 0 and needed(terms) > budget:
            terms -= 1
        if terms < 1 and self.bits is None:
            return 1
        if terms < 1:
            least = math.ceil(1e3 * needed(1) / math.prod(shape)) / 1e3
            raise metrics.DensityTooSmall(
                f"bits={self.bits} leave no signs for a {shape[0]}×{shape[1]} matrix, whose scales "
                f"alone take {_scale_bits(*shape):,} bits: choose at least {least:g}."
            )
        return terms


def _scale_bits(*lengths: int) -> int:
    """Return the bits of diagonals of these lengths."""
    return sum(SCALE_BITS * n + 16 * max(1, (2 * n + GROUP) // (2 * GROUP)) for n in lengths)


def _factors(product: BinaryProduct, W: Array, metric: Array | None) -> list[Factor]:
    """Return the factors, the outputs' scales fitted to the others as they are stored."""
    m, product.m = _diagonal(product.m)
    b, product.b = _diagonal(product.b)
    fit_outputs(product, W, metric)
    a, product.a = _diagonal(product.a)
    S, T = (SignFactor.from_dense(signs) for signs in (product.S, product.T))
    return [a, S, m, T, b]


def _diagonal(scales: Array) -> tuple[Factor, Array]:
    """Return scales as a factor in which each takes 8 bits, and the scales as they are there."""
    diagonal = KroneckerSparseFactor(scales[:, None, None, None])
    factor = rounded(diagonal, SCALE_BITS, GROUP)
    return factor, backend.namespace(scales).reshape(factor.decoded().values, (-1,))
