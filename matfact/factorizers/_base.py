"""Base class of the factorizers: validation, reporting and ``transform``."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_feature_names, _check_n_features, check_is_fitted

from matfact import backend, metrics
from matfact._threads import fit_threads
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._validation import check_calibration, check_matrix
from matfact.operators import Factor, FactorProduct
from matfact.operators._arithmetic import shared_namespace
from matfact.solvers._callback import History
from matfact.solvers.coding import coding_error

DENSITY = [Interval(Real, 0, 1, closed="right"), None]
"""Allowed values of the `density` parameter, for ``_parameter_constraints``."""


@dataclasses.dataclass(frozen=True)
class Factorization:
    """Result of a factorizer's solver."""

    factors: Sequence[Factor]
    n_iter: int = 1


class BaseFactorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base class of estimators that factorize a matrix.

    Subclasses implement `_factorize`; this class sets all fitted attributes.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {}
    #: FLOPs of a fit grow about like a side of a square matrix to this power.
    _side_power: ClassVar[float] = 3.0
    #: Whether complex matrices can be factorized.
    _allow_complex: ClassVar[bool] = False

    operator_: FactorProduct

    @abstractmethod
    def _factorize(self, W: Array, history: History) -> Factorization:
        """Return factors whose product approximates `W`.

        Parameters
        ----------
        W : array of shape (out_features, in_features)
            Finite, in a compute dtype, scaled so that its largest magnitude is in [1, 2), or all
            zero. Must not be modified.
        history : History
            Callback for the solver.
        """

    @property
    def uses_inputs(self) -> bool:
        """Whether calibration inputs change what is fitted."""
        return type(self)._factorize_calibrated is not BaseFactorizer._factorize_calibrated

    @property
    def has_density(self) -> bool:
        """Whether the number of stored values can be requested."""
        return "density" in self.get_params(deep=False)

    @property
    def has_free_support(self) -> bool:
        """Whether refits may choose the entries of the output-side factor again."""
        return False

    def fit_work(self, rows: int, columns: int, *, with_inputs: bool = False) -> float:
        """Return a number in proportion to the FLOPs of a fit, to compare fits of this class.

        Parameters
        ----------
        rows, columns : int
            Shape of the matrix.
        with_inputs : bool
            Whether the layer's inputs are used, in least squares of the size of their covariance.
        """
        if with_inputs:
            return float(rows * columns) * columns
        return float(rows * columns) * min(rows, columns) ** (self._side_power - 2)

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        """Return factors of `W` fitted to the layer's inputs.

        Like `_factorize`; overridden by factorizers that use calibration inputs.
        """
        raise ValueError(
            f"calibration must be None: {type(self).__name__} does not use the layer's inputs."
        )

    def fit(self, W: Any, y: Any = None, *, calibration: Any = None) -> Self:
        """Factorize `W`.

        Parameters
        ----------
        W : array-like of shape (out_features, in_features)
            The matrix, laid out like ``torch.nn.Linear.weight``. NumPy, CuPy and torch arrays
            stay on their device. Integers and long doubles are converted to float64.
        y : None
            Ignored; present for API consistency.
        calibration : array-like of shape (n_samples, in_features) or InputStatistics, optional
            Inputs of the layer, or their running statistics, from the same array library and on
            the same device as `W`. They also set ``layer_err_``. Factorizers that do not use
            calibration inputs raise an error.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, `W` or `calibration` is invalid, or if the density is too small for
            the structure.
        """
        self._validate_params()
        W = self._check_input(W, "W", reset=True)
        with fit_threads(math.prod(W.shape)):
            self._fit(W, calibration)
        return self

    def _fit(self, W: Array, calibration: Any) -> None:
        """Factorize the validated matrix `W` and set the fitted attributes."""
        statistics = None if calibration is None else check_calibration(calibration, W)
        work = backend.contiguous(backend.compute_array(W))
        # A power of two: scaling is exact, and fit(2 W) gives exactly 2 fit(W).
        scale = backend.unit(work)
        scaled = work if scale == 1.0 else work * (1 / scale)
        history = History()
        if statistics is None:
            result = self._factorize(scaled, history)
        else:
            result = self._factorize_calibrated(scaled, history, statistics)
        del scaled
        with np.errstate(over="ignore", invalid="ignore"):
            operator = FactorProduct(result.factors).rescaled(scale).astype(W.dtype)
            W_hat = operator.astype(work.dtype).toarray()
        _check_range(W_hat, W.dtype)
        self.operator_ = operator
        self.n_iter_ = result.n_iter
        self.history_ = history.as_dict()
        self._n_features_out = operator.shape[0]
        self._report(work, W_hat, statistics)

    def _report(self, W: Array, W_hat: Array, calibration: InputStatistics | None) -> None:
        """Set the attributes measured on the returned factors."""
        operator = self.operator_
        self.factors_ = operator.factors
        self.nnz_ = operator.nnz
        self.density_ = operator.density
        self.bits_per_weight_ = operator.bits_per_weight
        self.reconstruction_err_ = metrics.relative_error(W, W_hat)
        self.normalized_err_ = metrics.normalized_error(W, self.reconstruction_err_, self.nnz_)
        self.__dict__.pop("layer_err_", None)  # of an earlier fit
        if calibration is not None:
            self.layer_err_ = metrics.layer_error(W, W_hat, calibration.gram)

    def transform(self, X: Any) -> Array:
        """Apply the factorized layer: ``X @ Ŵ.T``.

        Parameters
        ----------
        X : array-like of shape (n_samples, in_features)
            Inputs of the layer, on the same device as the factors.

        Returns
        -------
        array of shape (n_samples, out_features)
            Outputs of the layer.
        """
        check_is_fitted(self)
        X = self._check_input(X, "X", reset=False)
        transpose = backend.namespace(X).matrix_transpose
        return transpose(self.operator_ @ transpose(X))

    def score(self, W: Any, y: Any = None) -> float:
        """Return the negative relative error of `W` represented by the fitted factors.

        For the fitted matrix this is ``-reconstruction_err_``. Other rows, such as those held
        out in cross-validation, are encoded with all factors but the first, using as many values
        per row as the first factor has. A low-rank product projects them on its row space; a
        single sparse factor keeps their largest entries.

        Parameters
        ----------
        W : array-like of shape (n_rows, in_features)
            The rows.
        y : None
            Ignored; present for API consistency.

        Returns
        -------
        float
            Between -1 and 0; higher is better.
        """
        check_is_fitted(self)
        W = backend.compute_array(self._check_input(W, "W", reset=False))
        operator = self.operator_
        shared_namespace(W, "W", operator.factors[0].values, "the factors")
        if not backend.is_complex(operator.factors[0].values) or backend.is_complex(W):
            operator = operator.astype(W.dtype)
        errors = []
        if tuple(W.shape) == operator.shape:
            errors.append(metrics.relative_error(W, operator.toarray()))
            if errors[0] == self.reconstruction_err_:  # bit-identical: this is the fitted matrix
                return -errors[0]
        errors.append(coding_error(W, operator))
        return -min(errors)

    def _check_input(self, X: Any, name: str, *, reset: bool) -> Array:
        """Validate a matrix and check, or set, the estimator's features."""
        _check_feature_names(self, X, reset=reset)
        array = check_matrix(X, name, allow_complex=self._allow_complex)
        _check_n_features(self, array, reset=reset)
        return array

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _check_range(W_hat: Array, dtype: Any) -> None:
    """Raise ``ValueError`` if an approximation overflows `dtype`."""
    xp = backend.namespace(W_hat)
    parts = [xp.real(W_hat), xp.imag(W_hat)] if backend.is_complex(W_hat) else [W_hat]
    largest = float(xp.finfo(dtype).max)
    if not all(backend.max_abs(part) <= largest for part in parts):
        raise ValueError(
            f"W must be smaller: its approximation exceeds {largest:.4g}, the largest number in "
            f"{dtype}. Scale W down, or convert it to a wider dtype."
        )
