"""Pruning by exact Optimal Brain Compression."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

from sklearn.utils._param_validation import Interval

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.constraints import Constraint, GlobalSparsity, NMSparsity, RowSparsity
from matfact.factorizers._base import Factorization
from matfact.factorizers._pruner import BasePruner
from matfact.operators import SparseFactor
from matfact.solvers._callback import History
from matfact.solvers.obs import obs_prune


class OBSPruner(BasePruner):
    """Drop one entry after the other, all others of its row making up for each.

    Exact Optimal Brain Compression (Frantar & Alistarh, 2022): of every row the entry goes next by
    which the outputs change least, the others being least squares. It is among the best supports
    known, in time that grows with the cube of the inputs, for every row: seconds for 384 × 384,
    minutes for 384 × 1536. `ADMMPruner` comes as near in a fraction of that. It runs on the
    processor wherever `W` is. Without calibration it is magnitude pruning.

    Parameters
    ----------
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None means 0.25, or one value
        (in each row or column, where they share alike) where that is more. It must be None with
        a set as `constraint`.
    constraint : Constraint or str, default="global_sparsity"
        Which entries may stay: with "global_sparsity" as many as `density` allows, the removals
        that cost least of all rows, with "row_sparsity" the same number in every row (output); or
        ``GlobalSparsity(k)``, ``RowSparsity(k)`` or ``NMSparsity(n, m)`` of
        `matfact.constraints`.
    damping : float, default=0.01
        What is added to the diagonal of the Gram matrix of the inputs, relative to its mean.

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
        1.
    history_ : dict of list
        ``objective`` (squared error of the outputs of the scaled `W`, damping included, over the
        mean squared norm of the inputs; ``‖W − Ŵ‖_F²`` without calibration) and ``seconds``, one
        entry an iteration.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    ADMMPruner : Nearly the same error, in less time, and for any set.
    SparseGPT : Faster, with a larger error.

    References
    ----------
    - E. Frantar, D. Alistarh, "Optimal brain compression: A framework for accurate
      post-training quantization and pruning", NeurIPS 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import OBSPruner, WandaPruner
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((32, 64))
    >>> X = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    >>> wanda, model = (P(0.5).fit(W, calibration=X) for P in (WandaPruner, OBSPruner))
    >>> model.nnz_, bool(model.layer_err_ < 0.6 * wanda.layer_err_)
    (1024, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BasePruner._parameter_constraints,
        "damping": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        density: float | None = None,
        constraint: Constraint | str = "global_sparsity",
        damping: float = 0.01,
    ) -> None:
        self.density = density
        self.constraint = constraint
        self.damping = damping

    def _set(self, shape: tuple[int, int]) -> Constraint:
        constraint = super()._set(shape)
        if not isinstance(constraint, (GlobalSparsity, RowSparsity, NMSparsity)):
            raise ValueError(
                "constraint must be a global, row or N:M sparsity for OBSPruner, which prunes "
                f"row by row; got {constraint}."
            )
        return constraint

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        constraint = self._set(W.shape)
        group, floor = W.shape[1], 0
        if isinstance(constraint, NMSparsity):
            group, floor = constraint.m, constraint.n
        elif isinstance(constraint, RowSparsity):
            floor = constraint.k
        pruned, objective = obs_prune(
            backend.to_numpy(W),
            backend.to_numpy(calibration.gram),
            total=constraint.nnz(W.shape),
            group=group,
            floor=floor,
            damping=float(self.damping),
        )
        history(1, objective)
        return Factorization([SparseFactor.from_dense(backend.like(pruned, W, W.dtype))])
