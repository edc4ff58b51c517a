"""What all factorizers share: validation, reporting, and applying the result."""

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
from matfact.solvers._callback import History
from matfact.solvers.coding import coding_error

#: Constraint on the `density` parameter, shared by the factorizers that have one.
DENSITY = [Interval(Real, 0, 1, closed="right"), None]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """What a factorizer's solver found."""

    factors: Sequence[Factor]
    n_iter: int = 1


class BaseFactorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base of the estimators that write a matrix as a product of factors.

    Subclasses implement :meth:`_factorize`; everything a user sees after ``fit`` is set here,
    in the same way for all of them.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {}
    #: Whether complex matrices can be factorized.
    _allow_complex: ClassVar[bool] = False

    operator_: FactorProduct

    @abstractmethod
    def _factorize(self, W: Array, history: History) -> Factorization:
        """Return factors whose product approximates `W`.

        Parameters
        ----------
        W : array of shape (out_features, in_features)
            Finite, in a dtype fit to compute in, scaled so that its largest magnitude lies in
            [1, 2) (or all zero). Must not be written to.
        history : History
            Callback to hand to the solver.
        """

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        """Return factors of `W` that also take the layer's inputs into account.

        As :meth:`_factorize`; overridden by the factorizers that can use calibration inputs.
        """
        raise ValueError(
            f"calibration must be None for {type(self).__name__}, which cannot use the layer's "
            "inputs."
        )

    def fit(self, W: Any, y: Any = None, *, calibration: Any = None) -> Self:
        """Factorize `W`.

        Parameters
        ----------
        W : array-like of shape (out_features, in_features)
            The matrix, laid out as ``torch.nn.Linear.weight``. NumPy, CuPy and torch arrays stay
            on their device. Long doubles are rounded to float64, integers become float64.
        y : None
            Ignored; present for API consistency.
        calibration : array-like of shape (n_samples, in_features) or InputStatistics, optional
            Inputs of the layer, of the array library and on the device of `W`, or their running
            statistics. With them ``layer_err_`` is reported; factorizers that cannot use them
            refuse them.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, `W` or `calibration` is invalid, or the density is too small for the
            structure.
        """
        self._validate_params()
        W = self._check_input(W, "W", reset=True)
        with fit_threads(math.prod(W.shape)):
            self._fit(W, calibration)
        return self

    def _fit(self, W: Array, calibration: Any) -> None:
        """Factorize the checked matrix `W`, and report."""
        statistics = None if calibration is None else check_calibration(calibration, W)
        work = backend.contiguous(backend.compute_array(W))
        # A power of two, so that scaling rounds nothing and fit(2 W) is exactly 2 fit(W).
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
        """Set the measured attributes, from the factors as they are returned."""
        operator = self.operator_
        self.factors_ = operator.factors
        self.nnz_ = operator.nnz
        self.density_ = operator.density
        self.bits_per_weight_ = 8 * operator.nbytes("stored") / math.prod(operator.shape)
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
            Inputs of the layer, on the device of the factors.

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
        """Return minus the relative error with which the fitted factors represent `W`.

        For the matrix that was fitted this is ``-reconstruction_err_``. Other rows, such as those
        that K-fold cross-validation holds out, are written anew with the factors after the
        first, by as many values a row as the first has: a product of low rank projects them on
        its row space, a single sparse factor keeps the largest of their entries.

        Parameters
        ----------
        W : array-like of shape (n_rows, in_features)
            The rows.
        y : None
            Ignored; present for API consistency.

        Returns
        -------
        float
            Between -1 and 0, the higher the better.
        """
        check_is_fitted(self)
        W = backend.compute_array(self._check_input(W, "W", reset=False))
        operator = self.operator_
        if not backend.is_complex(operator.factors[0].values) or backend.is_complex(W):
            operator = operator.astype(W.dtype)
        errors = []
        if tuple(W.shape) == operator.shape:
            errors.append(metrics.relative_error(W, operator.toarray()))
            if errors[0] == self.reconstruction_err_:  # no other matrix has the same to the bit
                return -errors[0]
        errors.append(coding_error(W, operator))
        return -min(errors)

    def _check_input(self, X: Any, name: str, *, reset: bool) -> Array:
        """Validate a matrix against the estimator's features, or set them."""
        _check_feature_names(self, X, reset=reset)
        array = check_matrix(X, name, allow_complex=self._allow_complex)
        _check_n_features(self, array, reset=reset)
        return array

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _check_range(W_hat: Array, dtype: Any) -> None:
    """Raise ``ValueError`` if an approximation has entries that are infinite in a dtype."""
    xp = backend.namespace(W_hat)
    parts = [xp.real(W_hat), xp.imag(W_hat)] if backend.is_complex(W_hat) else [W_hat]
    largest = float(xp.finfo(dtype).max)
    if not all(backend.max_abs(part) <= largest for part in parts):
        raise ValueError(
            f"W must be smaller: its approximation exceeds {largest:.4g}, the largest number of "
            f"{dtype}. Fit a fraction of W, or W in a wider dtype."
        )
