"""Structured pruning of the hidden units of a two-layer block."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_feature_names, _check_n_features, check_is_fitted

from matfact import backend, metrics
from matfact._threads import fit_threads
from matfact.backend import Array
from matfact.calibration import OutputStatistics
from matfact.factorizers._validation import check_matrix
from matfact.solvers import cosamp
from matfact.solvers._callback import History
from matfact.solvers.quadratic import Selection, quadratic

_SOLVERS = {
    "least_squares": cosamp.least_squares,
    "gradient": cosamp.gradient,
    "ispasp": cosamp.ispasp,
}


class CoSaMPNeuronSelector(SelectorMixin, BaseEstimator):
    """Select the hidden units that best reconstruct a block's outputs, and refit their weights.

    For a block ``U = H W₂ᵀ`` with activations `H`, find the columns `S` of `H` and the output
    weights `W` that minimize ``‖U − H_S Wᵀ‖_F`` (Walia et al., 2022; Wolfe & Kyrillidis, 2022;
    Needell & Tropp, 2009). `U` may be any outputs: those of gated or normalized blocks, of other
    activation functions, or regression targets. Only second moments are used, so activations can be
    streamed through `matfact.calibration.OutputStatistics`.

    Parameters
    ----------
    n_neurons : int, float or None, default=None
        Hidden units to keep: a number, or a fraction in (0, 1] (rounded down, at least one).
        None keeps half of them, or as few as `max_error` allows.
    method : {"least_squares", "gradient", "ispasp"}, default="least_squares"
        "least_squares" solves for the weights in closed form in every iteration. "gradient" (Walia
        et al., 2022) and "ispasp" (Wolfe & Kyrillidis, 2022) are the published procedures: the
        first takes gradient steps, the second keeps the weights of the dense block and suits
        non-negative activations. The error of "least_squares" is at most that of "ispasp" and
        rarely above that of "gradient".
    max_iter : int, default=50
        Maximum number of iterations. "least_squares" uses up to this many from each starting
        point, and stops earlier when no exchange of units helps.
    max_error : float or None, default=None
        Upper bound on ``reconstruction_err_``, in [0, 1), instead of `n_neurons`. Bisection
        finds the smallest number of units. Only for "least_squares".

    Attributes
    ----------
    support_ : ndarray of bool of shape (n_features_in_,)
        Mask of the kept units.
    coef_ : array of shape (n_outputs, n_neurons) or (n_neurons,)
        Output weights of the kept units, with the device and dtype of the activations; 1-D if
        the outputs are.
    reconstruction_err_ : float
        ``‖U − H_S coef_ᵀ‖_F / ‖U‖_F``.
    n_iter_ : int
        Number of iterations.
    history_ : dict of list
        ``objective`` (squared relative error of the best selection of the current run) and
        ``seconds``, one entry per iteration.
    n_features_in_ : int
        Number of hidden units of the block.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `H`, if it has any.

    Notes
    -----
    Because second moments hold squares, a ``reconstruction_err_`` below about 1e-7 is rounding.

    References
    ----------
    - A. Walia, H. K. Jayakumar, S. B. Koride, "Optimized structured neural pruning with
      auxiliary training", 2022.
    - C. R. Wolfe, A. Kyrillidis, "i-SpaSP: structured neural pruning via sparse signal
      recovery", L4DC 2022.
    - D. Needell, J. A. Tropp, "CoSaMP: iterative signal recovery from incomplete and
      inaccurate samples", Applied and Computational Harmonic Analysis 26, 2009.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import CoSaMPNeuronSelector
    >>> H = np.random.RandomState(0).rand(50, 4)
    >>> H[:, 2] = H[:, 0] + H[:, 1]
    >>> selector = CoSaMPNeuronSelector(n_neurons=2).fit(H, 3 * H[:, [0]] + 3 * H[:, [1]])
    >>> bool(selector.support_[2]), bool(selector.reconstruction_err_ < 1e-7)
    (True, True)
    >>> selector.transform(H).shape, selector.coef_.shape
    ((50, 2), (1, 2))
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_neurons": [
            Interval(Integral, 1, None, closed="left"),
            Interval(Real, 0, 1, closed="right"),
            None,
        ],
        "method": [StrOptions(set(_SOLVERS))],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "max_error": [Interval(Real, 0, 1, closed="left"), None],
    }

    def __init__(
        self,
        n_neurons: int | float | None = None,
        method: Literal["least_squares", "gradient", "ispasp"] = "least_squares",
        max_iter: int = 50,
        max_error: float | None = None,
    ) -> None:
        self.n_neurons = n_neurons
        self.method = method
        self.max_iter = max_iter
        self.max_error = max_error

    def fit(self, H: Any, y: Any = None) -> Self:
        """Select hidden units.

        Parameters
        ----------
        H : array-like of shape (n_samples, n_hidden) or OutputStatistics
            Activations of the hidden units, or statistics of activations and outputs. NumPy,
            CuPy and torch arrays stay on their device.
        y : array-like of shape (n_samples, n_outputs) or (n_samples,)
            The block's outputs `U`, from the same library and on the same device as `H`. Must be
            None if `H` holds statistics.

        Returns
        -------
        self : object
            The fitted selector.

        Raises
        ------
        ValueError
            If a parameter, `H` or `y` is invalid, or if `max_error` is out of reach even with
            all units.
        """
        self._validate_params()
        self._check_target()
        statistics, dtype, one_output = self._statistics(H, y)
        history = History()
        with fit_threads(self.n_features_in_**2):
            result = self._select(statistics, history)
            xp = backend.namespace(result.weights)
            weights = xp.astype(result.weights, dtype)
            problem = quadratic(statistics)
            # Error of the returned weights, after rounding to the dtype.
            error = problem.error(result.support, backend.wide(weights) / problem.unit)
        self.support_ = np.zeros(self.n_features_in_, dtype=bool)
        self.support_[result.support] = True
        self.coef_ = weights[:, 0] if one_output else xp.matrix_transpose(weights)
        self.reconstruction_err_ = float(np.sqrt(error))
        self.n_iter_ = result.n_iter
        self.history_ = history.as_dict()
        return self

    def _select(self, statistics: OutputStatistics, history: History) -> Selection:
        """Return the units to keep and their weights."""
        if self.max_error is None:
            solve = _SOLVERS[self.method]
            return solve(statistics, self._count(), self.max_iter, history)
        return cosamp.smallest_selection(statistics, self.max_error**2, self.max_iter, history)

    def _statistics(self, H: Any, y: Any) -> tuple[OutputStatistics, Any, bool]:
        """Return the statistics, the dtype of results, and whether the outputs are 1-D."""
        if isinstance(H, OutputStatistics):
            if y is not None:
                raise ValueError("y must be None when H holds statistics: they include outputs.")
            if not H.inputs.count:
                raise ValueError("H must hold statistics of at least one sample, got none.")
            _check_n_features(self, H.inputs.gram, reset=True)
            self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
            return H, H.cross.dtype, False
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        H = self._check_input(H, reset=True)
        if not backend.is_array(y):
            y = backend.like(np.asarray(y), H)
        one_output = y.ndim == 1
        y = check_matrix(y[:, None] if one_output else y, "y")
        if backend.namespace(y) is not backend.namespace(H):
            raise ValueError("y must be an array from the same library as H.")
        return OutputStatistics().update(H, y), H.dtype, one_output

    def _check_target(self) -> None:
        """Raise ``ValueError`` if `max_error` cannot be combined with the other parameters."""
        if self.max_error is None:
            return
        if self.n_neurons is not None:
            raise ValueError(f"n_neurons must be None with max_error, got {self.n_neurons}.")
        if self.method != "least_squares":
            raise ValueError(f"method must be 'least_squares' with max_error, got {self.method!r}.")

    def _count(self) -> int:
        """Return how many units to keep."""
        n_hidden = self.n_features_in_
        wanted = 0.5 if self.n_neurons is None else self.n_neurons
        if not isinstance(wanted, Integral):
            return max(1, metrics.part_of(n_hidden, wanted))
        if wanted > n_hidden:
            raise ValueError(
                f"n_neurons must be at most the {n_hidden} hidden units, got {wanted}."
            )
        return int(wanted)

    def transform(self, X: Any) -> Array:
        """Return the activations of the kept units.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_hidden)
            Activations of all hidden units.

        Returns
        -------
        array of shape (n_samples, n_neurons)
            Activations of the kept units, from the same library and device as `X`.
        """
        check_is_fitted(self)
        X = self._check_input(X, reset=False)
        return backend.namespace(X).take(X, backend.like(self.get_support(True), X), axis=1)

    def inverse_transform(self, X: Any) -> Array:
        """Return the activations with zeros for the pruned units.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_neurons)
            Activations of the kept units.

        Returns
        -------
        array of shape (n_samples, n_hidden)
            Activations of all units.
        """
        check_is_fitted(self)
        X = check_matrix(X, "X")
        kept = self.get_support(True)
        if X.shape[1] != len(kept):
            raise ValueError(f"X must have {len(kept)} columns, got {X.shape[1]}.")
        source = np.full(self.n_features_in_, len(kept))
        source[kept] = np.arange(len(kept))
        xp = backend.namespace(X)
        padded = xp.concat([X, xp.zeros_like(X[:, :1])], axis=1)
        return xp.take(padded, backend.like(source, X), axis=1)

    def score(self, H: Any, y: Any) -> float:
        """Return the negative relative error of the outputs reconstructed from the kept units.

        Parameters
        ----------
        H : array-like of shape (n_samples, n_hidden)
            Activations of all hidden units.
        y : array-like of shape (n_samples, n_outputs) or (n_samples,)
            The block's outputs.
        """
        kept = self.transform(H)
        y = y if backend.is_array(y) else backend.like(np.asarray(y), kept)
        y = check_matrix(y if y.ndim == 2 else y[:, None], "y")
        weights = self.coef_ if self.coef_.ndim == 2 else self.coef_[None, :]
        return -metrics.relative_error(
            y, kept @ backend.namespace(weights).matrix_transpose(weights)
        )

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self)
        return self.support_

    def _check_input(self, X: Any, *, reset: bool) -> Array:
        """Validate activations and check, or set, the estimator's features."""
        _check_feature_names(self, X, reset=reset)
        array = check_matrix(X, "H" if reset else "X")
        _check_n_features(self, array, reset=reset)
        return array

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags
