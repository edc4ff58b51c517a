"""Truncated singular value decomposition, plain or weighted by the layer's inputs."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

from sklearn.utils._param_validation import Interval

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.operators import DenseFactor
from matfact.solvers._callback import History
from matfact.solvers.svd import truncated_svd, whitened_svd


class LowRank(BaseFactorizer):
    """Low-rank approximation by two dense factors.

    Without calibration inputs this is the truncated singular value decomposition, the best
    approximation of its rank in the Frobenius norm (Eckart & Young, 1936). With
    ``fit(W, calibration=X)`` it minimizes the error of the layer's outputs, ``‖XWᵀ − XŴᵀ‖_F`` (Wang
    et al., 2025); the inputs need not span the whole space.

    Parameters
    ----------
    rank : int or None, default=None
        Rank of the product, at most min(out_features, in_features). None follows `density`.
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]; the rank is the largest that
        fits. None means 0.25, raised if needed to rank one. At most one of `rank` and `density`
        may be given.

    Attributes
    ----------
    operator_ : FactorProduct
        The product of the two factors. Their inner dimension is the rank, limited by the rank
        of `W`.
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
        1: the solution has a closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry per iteration.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - C. Eckart, G. Young, "The approximation of one matrix by another of lower rank",
      Psychometrika 1, 1936.
    - X. Wang, Y. Zheng, Z. Wan, M. Zhang, "SVD-LLM: truncation-aware singular value
      decomposition for large language model compression", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import LowRank
    >>> W = np.outer(np.arange(1.0, 6.0), np.ones(4))
    >>> model = LowRank(rank=1).fit(W)
    >>> model.nnz_, bool(model.reconstruction_err_ < 1e-14)
    (9, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "rank": [Interval(Integral, 1, None, closed="left"), None],
        "density": DENSITY,
    }

    def __init__(self, rank: int | None = None, density: float | None = None) -> None:
        self.rank = rank
        self.density = density

    def _factorize(self, W: Array, history: History) -> Factorization:
        return self._finish(W, truncated_svd(W, self._allowed_rank(W)), history)

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        rank = self._allowed_rank(W)
        return self._finish(W, whitened_svd(W, rank, calibration.second_moment), history)

    def _allowed_rank(self, W: Array) -> int:
        """Return `rank`, or the largest rank that fits `density`."""
        rows, columns = W.shape
        if self.rank is None:
            budget = metrics.stored_value_budget(self.density, W.shape, minimum=rows + columns)
            return budget // (rows + columns)
        if self.density is not None:
            raise ValueError(
                "at most one of rank and density may be given, "
                f"got rank={self.rank} and density={self.density}."
            )
        if self.rank > min(rows, columns):
            raise ValueError(
                f"rank must be at most {min(rows, columns)} for a {rows}×{columns} matrix, "
                f"got {self.rank}."
            )
        return int(self.rank)

    @staticmethod
    def _finish(W: Array, factors: tuple[Array, Array], history: History) -> Factorization:
        left, right = factors
        history(1, backend.norm(W - backend.namespace(W).matmul(left, right)) ** 2)
        return Factorization([DenseFactor(left), DenseFactor(right)])
