"""Magnitude pruning, the baseline that normalizes the errors of all methods."""

from __future__ import annotations

from matfact.constraints import Constraint
from matfact.factorizers._pruner import BasePruner


class MagnitudePruner(BasePruner):
    """Keep the entries of largest magnitude.

    This is the exact projection onto matrices with a given number of nonzeros (Han et al., 2015),
    and the baseline of ``normalized_err_``.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. None means 0.25, raised if
        needed to one value (per row or column for "row_sparsity" and "column_sparsity"). Must be
        None if `constraint` is an object.
    constraint : Constraint or str, default="global_sparsity"
        Which entries may be kept. "global_sparsity" puts no limit on where they are;
        "row_sparsity" and "column_sparsity" keep the same number in every row or column. Any
        sparsity or support of `matfact.constraints` also works, such as ``NMSparsity(2, 4)``.

    Attributes
    ----------
    operator_ : FactorProduct
        The pruned matrix, one sparse factor.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of keeping the ``nnz_`` largest entries: 1, or more if
        `constraint` excludes some of them, or 0 if the result is exact.
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
    - S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for
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
