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
    """Keep the entries of largest magnitude times norm of the input they multiply.

    Pruning by weights and activations [1]_: as fast as magnitude pruning, with the values as
    they are, and better where inputs of a layer differ in size. :class:`ADMMPruner` also takes
    their correlations into account, and changes the values. Without calibration inputs all count
    alike, which is magnitude pruning in each row.

    Parameters
    ----------
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None means 0.25, or one value
        (in each row or column, where they share alike) where that is more. It must be None with
        a set as `constraint`.
    constraint : Constraint or str, default="row_sparsity"
        Which entries may stay: with "row_sparsity", as published, or "column_sparsity" the same
        number in every row (output) or column (input), with "global_sparsity" as many as
        `density` allows anywhere; or any sparsity or support of :mod:`matfact.constraints`, such
        as ``NMSparsity(2, 4)``.

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
        Bits of the file that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        1: the solution is in closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry an iteration.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    ADMMPruner : Lower error of the outputs, in more time.
    MagnitudePruner : Without regard to inputs.

    References
    ----------
    .. [1] M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A simple and effective pruning approach for
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
