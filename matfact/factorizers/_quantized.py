"""Factorizations whose values take few bits each."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

from sklearn.base import clone
from sklearn.utils._param_validation import HasMethods, Interval

from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import BaseFactorizer, Factorization
from matfact.factorizers._dsf import DoubleSparseFactorizer
from matfact.factorizers._scaled import fit_scaled
from matfact.operators import FactorProduct
from matfact.operators._quantized import LARGEST_GROUP
from matfact.solvers._callback import History
from matfact.solvers.finalize import finalize, input_scale, reselect
from matfact.solvers.layerwise import caution
from matfact.solvers.quantized_product import quantize


class Quantized(BaseFactorizer):
    """Another factorization, its values quantized.

    Values become codes of few bits, integers times a 16-bit scale that a group of values shares.
    Rounding knows the error: factors are rounded in turn, those not rounded yet are refitted on
    their supports, and the levels of two scattered factors then move to make up for each other.
    With 8 bits the error is that of floating point values, with 4 bits a few percent larger.

    Parameters
    ----------
    estimator : BaseFactorizer or None, default=None
        What factorizes the matrix; None stands for ``DoubleSparseFactorizer()``.
    bits : int, default=4
        Bits of a value, from 2 to 8.
    group_size : int or None, default=64
        Number of values of a row that share a scale, about; None for all of them.

    Attributes
    ----------
    estimator_ : BaseFactorizer
        The fitted factorizer, its values floating point numbers.
    operator_ : FactorProduct
        The product of the quantized factors.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    layer_err_ : float
        ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for the calibration inputs `X`; only with calibration.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Iterations of the factorizer.
    history_ : dict of list
        That of the factorizer.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    DoubleBinaryFactorizer : One bit an entry, more accurate below about two and a half bits.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import DoubleSparseFactorizer, Quantized
    >>> W = np.random.default_rng(0).standard_normal((64, 64))
    >>> model = Quantized(DoubleSparseFactorizer(density=0.25), bits=6).fit(W)
    >>> ratio = model.reconstruction_err_ / model.estimator_.reconstruction_err_
    >>> model.nnz_, bool(ratio < 1.02)
    (1024, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": [HasMethods(["fit", "get_params"]), None],
        "bits": [Interval(Integral, 2, 8, closed="both")],
        "group_size": [Interval(Integral, 1, LARGEST_GROUP, closed="both"), None],
    }

    estimator_: BaseFactorizer

    def __init__(
        self,
        estimator: BaseFactorizer | None = None,
        bits: int = 4,
        group_size: int | None = 64,
    ) -> None:
        self.estimator = estimator
        self.bits = bits
        self.group_size = group_size

    def _factorize(self, W: Array, history: History) -> Factorization:
        self.estimator_ = self._unfitted().fit(W)
        return self._rounded(self.estimator_.operator_, W, history)

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        estimator, damped = self._unfitted(), calibration.damped(caution(calibration))
        moment = damped.second_moment
        if estimator.uses_inputs:
            self.estimator_ = estimator.fit(W, calibration=calibration)
            product = self.estimator_.operator_
        else:
            self.estimator_, product = fit_scaled(estimator, W, input_scale(moment))
            if estimator.has_free_support:
                product = reselect(product, W, moment)
            product = finalize(product, W, moment)
        return self._rounded(product, W, history, moment)

    def _rounded(
        self, product: FactorProduct, W: Array, history: History, moment: Array | None = None
    ) -> Factorization:
        found = quantize(product.rescaled(1.0), W, self.bits, self.group_size, moment)
        past = self.estimator_.history_
        history.objective, history.seconds = past["objective"], past["seconds"]
        return Factorization(found.factors, self.estimator_.n_iter_)

    def _unfitted(self) -> BaseFactorizer:
        """Return the factorizer to fit."""
        if self.estimator is None:
            return DoubleSparseFactorizer()
        estimator = self.estimator
        if not isinstance(estimator, BaseFactorizer) or "bits" in estimator.get_params(deep=False):
            raise ValueError(
                f"estimator must be a factorizer with floating point values, got {estimator!r}."
            )
        return clone(estimator)
