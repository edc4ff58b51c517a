"""What the estimators share that round a matrix to few levels."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, Literal

import numpy as np
from sklearn.base import clone
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from matfact import backend
from matfact.backend import Array
from matfact.factorizers._base import BaseFactorizer, Factorization
from matfact.operators import DenseFactor, QuantizedFactor
from matfact.operators._quantized import LARGEST_GROUP, group_bounds
from matfact.solvers._callback import History
from matfact.solvers.gptq import Rounded, round_to_nearest


class BaseQuantizer(BaseFactorizer):
    """Base of the estimators that keep every entry of a matrix, in few bits each."""

    _side_power = 2.0
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "bits": [Interval(Integral, 2, 8, closed="both")],
        "group_size": [Interval(Integral, 1, LARGEST_GROUP, closed="both"), None],
        "grid": [StrOptions({"fitted", "min_max"})],
    }

    bits: int
    group_size: int | None
    grid: Literal["fitted", "min_max"]

    def _factorize(self, W: Array, history: History) -> Factorization:
        return self._nearest(W, history)

    def _nearest(
        self, W: Array, history: History, weights: np.ndarray | None = None
    ) -> Factorization:
        """Return each entry rounded to the nearest level, errors of columns weighted."""
        is_min_max = self.grid == "min_max"
        rounded = round_to_nearest(
            W, self._bounds(W), self.bits, min_max=is_min_max, weights=weights
        )
        return self._quantized(rounded, history)

    def score(self, W: Any, y: Any = None) -> float:
        """Return the negative relative error of `W`; rows other than the fitted ones are rounded.

        Parameters
        ----------
        W : array-like of shape (n_rows, in_features)
            The rows.
        y : None
            Ignored; present for API consistency.

        Returns
        -------
        float
            At most 0, higher is better.
        """
        check_is_fitted(self)
        rows = self._check_input(W, "W", reset=False)
        if tuple(rows.shape) == self.operator_.shape:
            return super().score(W)
        return -clone(self).fit(W).reconstruction_err_

    def _bounds(self, W: Array) -> np.ndarray:
        """Return where groups of columns begin, and where the last one ends."""
        bounds = group_bounds(DenseFactor(W), self.group_size)
        return bounds[: (len(bounds) - 1) // W.shape[0] + 1]

    def _quantized(self, rounded: Rounded, history: History) -> Factorization:
        history(1, rounded.objective)
        scales = backend.namespace(rounded.scales).reshape(rounded.scales, (-1,))
        factor = QuantizedFactor(
            rounded.levels, scales, self.bits, self.group_size, DenseFactor(rounded.levels)
        )
        return Factorization([factor])
