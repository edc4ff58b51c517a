"""Magnitude pruning, the baseline every other method is normalized by."""

from __future__ import annotations

from typing import Any, ClassVar

from matfact import backend, kernels, metrics
from matfact.backend import Array
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.operators import SparseFactor
from matfact.solvers._callback import History


class MagnitudePruner(BaseFactorizer):
    """Keep the entries of largest magnitude.

    The exact projection onto matrices with a given number of nonzeros [1]_, and the yardstick of
    ``normalized_err_``.

    Parameters
    ----------
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None means 0.25, or one value
        where that is more.

    Attributes
    ----------
    operator_ : FactorProduct
        The pruned matrix, one sparse factor.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``: 1 here, or 0
        where nothing was lost.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    n_iter_ : int
        1: the solution is in closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry an iteration.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    References
    ----------
    .. [1] S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for
       efficient neural networks", NeurIPS 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import MagnitudePruner
    >>> pruner = MagnitudePruner(density=0.5).fit(np.array([[3.0, 0.1], [0.2, 4.0]]))
    >>> pruner.operator_.toarray()
    array([[3., 0.],
           [0., 4.]])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {"density": DENSITY}

    def __init__(self, density: float | None = None) -> None:
        self.density = density

    def _factorize(self, W: Array, history: History) -> Factorization:
        xp = backend.namespace(W)
        budget = metrics.stored_value_budget(self.density, W.shape)
        mask = kernels.top_k_mask(xp.abs(W), budget) & (W != 0)
        history(1, float(xp.sum(xp.where(mask, 0.0, W) ** 2)))
        return Factorization([SparseFactor.from_dense(W, mask)])
