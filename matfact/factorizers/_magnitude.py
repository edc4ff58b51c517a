"""Magnitude pruning, the baseline every other method is normalized by."""

from __future__ import annotations

from matfact.constraints import Constraint
from matfact.factorizers._pruner import BasePruner


class MagnitudePruner(BasePruner):
    """Keep the entries of largest magnitude.

    The exact projection onto matrices with a given number of nonzeros [1]_, and the yardstick of
    ``normalized_err_``.

    Parameters
    ----------
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None means 0.25, or one value
        (in each row or column, where they share alike) where that is more. It must be None with
        a set as `constraint`.
    constraint : Constraint or str, default="global_sparsity"
        Which entries may stay: anywhere as many as `density` allows, or with "row_sparsity" or
        "column_sparsity" the same number in every row or column; or any sparsity or support of
        :mod:`matfact.constraints`, such as ``NMSparsity(2, 4)``.

    Attributes
    ----------
    operator_ : FactorProduct
        The pruned matrix, one sparse factor.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of keeping the ``nnz_`` largest entries: 1 here, more with
        a `constraint` that forbids some of them, or 0 where nothing was lost.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the file that ``operator_.save`` writes ÷ entries of `W`.
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

    def __init__(
        self, density: float | None = None, constraint: Constraint | str = "global_sparsity"
    ) -> None:
        self.density = density
        self.constraint = constraint
