"""Pruning by weights and activations (Wanda)."""

from __future__ import annotations

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.constraints import Constraint
from matfact.factorizers._base import Factorization
from matfact.factorizers._pruner import BasePruner
from matfact.solvers._callback import History
from matfact.solvers.layerwise import input_norms


class WandaPruner(BasePruner):
    """Keep the entries with the largest product of magnitude and input norm.

    Pruning by weights and activations (Wanda) (Sun et al., 2024) is as fast as magnitude pruning,
    keeps the values unchanged, and is better if the inputs of a layer differ in size.
    `ADMMPruner` also uses their correlations and updates the values. Without calibration,
    all inputs count equally, which gives magnitude pruning within each row.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. None means 0.25, raised if
        needed to one value (per row or column for "row_sparsity" and "column_sparsity"). Must be
        None if `constraint` is an object.
    constraint : Constraint or str, default="row_sparsity"
        Which entries may be kept. "row_sparsity", as published, and "column_sparsity" keep the
        same number in every row (output) or column (input); "global_sparsity" puts no limit on
        where they are. Any sparsity or support of `matfact.constraints` also works, such as
        ``NMSparsity(2, 4)``.

    Attributes
    ----------
    operator_ : FactorProduct
        The pruned matrix, one sparse factor.
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

    See Also
    --------
    ADMMPruner : Slower, with a lower error of the outputs.
    MagnitudePruner : Does not use inputs.

    References
    ----------
    - M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A simple and effective pruning approach for
      large language models", ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import WandaPruner
    >>> X = np.array([[0.1, 2.0], [-0.1, 3.0]])
    >>> pruner = WandaPruner(density=0.5).fit(np.array([[3.0, 1.0], [5.0, 2.0]]), calibration=X)
    >>> pruner.operator_.toarray()
    array([[0., 1.],
           [0., 2.]])
    """

    def __init__(
        self, density: float | None = None, constraint: Constraint | str = "row_sparsity"
    ) -> None:
        self.density = density
        self.constraint = constraint

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        norms = backend.namespace(W).astype(input_norms(calibration.gram), W.dtype)
        return self._kept(W, self._set(W.shape).support(W * norms), history)
