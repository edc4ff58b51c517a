"""Pruning with error feedback (SparseGPT)."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

from sklearn.utils._param_validation import Interval

from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.constraints import Constraint
from matfact.factorizers._base import Factorization
from matfact.factorizers._pruner import BasePruner
from matfact.operators import SparseFactor
from matfact.solvers._callback import History
from matfact.solvers.sparsegpt import sparsegpt


class SparseGPT(BasePruner):
    """Drop entries input by input, what each costs made up for by the inputs that follow.

    The published baseline (Frantar & Alistarh, 2023), in a few products of matrices. Entries that
    have been passed stay as they are; `ADMMPruner` and `OBSPruner` refit all of them,
    and lose far less where inputs are strongly correlated. Without calibration it is magnitude
    pruning.

    Parameters
    ----------
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None means 0.25, or one value
        (in each row or column, where they share alike) where that is more. It must be None with
        a set as `constraint`.
    constraint : Constraint or str, default="global_sparsity"
        Which entries may stay: with "global_sparsity", as published, the same share of every 128
        consecutive inputs, with "row_sparsity" also in every row (output), with
        "column_sparsity" in every column (input); or any sparsity or support of
        `matfact.constraints`, such as ``NMSparsity(2, 4)``. Sets that cannot be chosen a few
        inputs at a time are chosen as by `WandaPruner`.
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
    ADMMPruner : Lower error of the outputs, in more time.
    GPTQ : The same sweep, for rounding.

    References
    ----------
    - E. Frantar, D. Alistarh, "SparseGPT: Massive language models can be accurately pruned in
      one-shot", ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import SparseGPT, WandaPruner
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((32, 64))
    >>> X = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    >>> wanda, model = (P(0.5).fit(W, calibration=X) for P in (WandaPruner, SparseGPT))
    >>> model.nnz_, bool(model.layer_err_ < 0.95 * wanda.layer_err_)
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

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        pruned, objective = sparsegpt(
            W, calibration.gram, self._set(W.shape), damping=float(self.damping)
        )
        history(1, objective)
        return Factorization([SparseFactor.from_dense(pruned)])
