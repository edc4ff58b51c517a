"""Base class of the pruners: which entries of a matrix may be kept."""

from __future__ import annotations

from typing import Any, ClassVar

from matfact import backend, metrics
from matfact.backend import Array
from matfact.constraints import (
    Constraint,
    Sparsity,
    Support,
    get_constraint,
    resolve_constraint,
)
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.operators import SparseFactor
from matfact.solvers._callback import History


class BasePruner(BaseFactorizer):
    """Base class of estimators that prune a matrix to one sparse factor."""

    _side_power = 2.0
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "constraint": [Constraint, str],
    }

    density: float | None
    constraint: Constraint | str

    def _factorize(self, W: Array, history: History) -> Factorization:
        return self._kept(W, self._set(W.shape).support(W), history)

    def _kept(self, W: Array, support: Array, history: History) -> Factorization:
        """Return the entries of `W` on `support`, unchanged."""
        xp = backend.namespace(W)
        support = support & (W != 0)
        history(1, float(xp.sum(xp.where(support, 0.0, W) ** 2)))
        return Factorization([SparseFactor.from_dense(W, support)])

    def _set(self, shape: tuple[int, int]) -> Constraint:
        """Return the constraint defined by `constraint` and `density`."""
        groups = {"global_sparsity": 1, "row_sparsity": shape[0], "column_sparsity": shape[1]}
        name = self.constraint
        if isinstance(name, str) and name in groups:
            budget = metrics.stored_value_budget(self.density, shape, minimum=groups[name])
            return get_constraint(name, k=budget // groups[name])
        constraint = resolve_constraint(self.constraint, "constraint")
        if not isinstance(constraint, (Sparsity, Support)):
            raise ValueError(f"constraint must be a sparsity or a support, got {constraint}.")
        if self.density is not None:
            raise ValueError(
                f"density must be None with constraint={constraint}, which sets it; got "
                f"{self.density}."
            )
        try:
            constraint.nnz(shape)
        except ValueError as error:
            raise ValueError(f"constraint: {error}") from None
        return constraint
