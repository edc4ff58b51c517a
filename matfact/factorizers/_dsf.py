"""Double sparse factorization."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from sklearn.utils._param_validation import Interval, StrOptions

from matfact import backend, metrics
from matfact.backend import Array
from matfact.constraints import GlobalSparsity
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.operators import SparseFactor
from matfact.solvers._callback import History
from matfact.solvers.dsf import dsf, pruned


class DoubleSparseFactorizer(BaseFactorizer):
    """A product of two sparse matrices, ``W ≈ A B``.

    Double sparse factorization [1]_: alternating sparse regressions by ADMM, here on a schedule
    of penalties and of nonzeros that finds better supports in fewer sweeps. Nonzeros may stand
    anywhere, which makes it the most accurate of the factorizations that store as few values.

    Parameters
    ----------
    density : float or None, default=None
        Stored values of both factors ÷ entries of `W`, in (0, 1]; never exceeded. None means
        0.25, or two values where that is more.
    first_factor_density : float or "auto", default="auto"
        Nonzeros of `A` ÷ its entries, in (0, 1]; `B` takes what is left of the budget. "auto"
        halves the budget between the factors of a square `W`, and gives the longer factor of
        another the larger share, by the square root of its length.
    max_iter : int, default=100
        Number of sweeps over both factors. Penalties and nonzeros are scheduled over them, so
        that more sweeps find better supports.

    Attributes
    ----------
    operator_ : FactorProduct
        The product of the two factors. The inner dimension is the shorter side of `W`.
    factors_ : tuple of Factor
        `A` and `B`.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    n_iter_ : int
        Sweeps over both factors.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry an iteration.
        The objective may rise: the schedule looks for good supports first. A last refit of the
        values lowers it once more after the last entry.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    References
    ----------
    .. [1] V. Boža, V. Macko, "Two sparse matrices are better than one: sparsifying neural
       networks with double sparse factorization", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import DoubleSparseFactorizer
    >>> W = np.random.default_rng(0).standard_normal((64, 64))
    >>> model = DoubleSparseFactorizer(density=0.25).fit(W)
    >>> model.nnz_, bool(model.normalized_err_ < 0.75)
    (1024, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "first_factor_density": [Interval(Real, 0, 1, closed="right"), StrOptions({"auto"})],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        density: float | None = None,
        first_factor_density: float | Literal["auto"] = "auto",
        max_iter: int = 100,
    ) -> None:
        self.density = density
        self.first_factor_density = first_factor_density
        self.max_iter = max_iter

    def _factorize(self, W: Array, history: History) -> Factorization:
        left_nnz, right_nnz = self._budgets(W)
        xp = backend.namespace(W)
        tall = W.shape[0] > W.shape[1]
        if tall:  # the solver wants the square factor first
            W = xp.matrix_transpose(W)
            left_nnz, right_nnz = right_nnz, left_nnz
        sets = GlobalSparsity(left_nnz), GlobalSparsity(right_nnz)
        *found, n_iter = dsf(W, *sets, max_iter=self.max_iter, callback=history)
        candidates = [found, pruned(W, left_nnz + right_nnz)]
        best = min(candidates, key=lambda pair: backend.norm(W - xp.matmul(*pair)))
        factors = [xp.matrix_transpose(f) for f in reversed(best)] if tall else best
        return Factorization([SparseFactor.from_dense(f) for f in factors], n_iter)

    def _budgets(self, W: Array) -> tuple[int, int]:
        """Return how many nonzeros `A` and `B` may have."""
        rows, columns = W.shape
        side = min(rows, columns)
        budget = metrics.stored_value_budget(self.density, W.shape, minimum=2)
        if self.first_factor_density == "auto":
            weights = math.sqrt(rows), math.sqrt(columns)
            first = round(budget * weights[0] / sum(weights))
        else:
            first = math.floor(round(self.first_factor_density * rows * side, 9))
            if not 1 <= first < budget:
                raise ValueError(
                    f"first_factor_density must give the {rows}×{side} first factor at least 1 "
                    f"and fewer than {budget} nonzeros, all that density={self.density} allows; "
                    f"got {self.first_factor_density}, which gives {first}."
                )
        first = min(max(first, 1, budget - side * columns), rows * side, budget - 1)
        return first, budget - first
