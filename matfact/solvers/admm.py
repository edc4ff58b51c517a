"""Sparse regression by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matfact import backend, kernels
from matfact.backend import Array
from matfact.constraints import Constraint

#: Share of the diagonal added to every Gram matrix, which keeps it positive definite (Boža & Macko
#: 2025).
DAMPING = 0.02


@dataclasses.dataclass(frozen=True)
class SparseState:
    """Where ADMM stands: the sparse solution on `support`, the scaled dual off it.

    The two never overlap, since projecting on a support leaves the solution on it and hands the
    rest to the dual; one array holds both.
    """

    values: Array
    support: Array

    @property
    def solution(self) -> Array:
        """The sparse solution as a dense array."""
        return backend.restricted(self.values, self.support)


def sparse_regression(
    gram: Array,
    cross: Array,
    state: SparseState,
    constraint: Constraint,
    penalties: Sequence[float],
) -> SparseState:
    """Lower ``‖Mᵀ X − W‖_F²`` over `X` with a constrained support, one step for each penalty.

    Source: Boža & Macko 2025, algorithm 1 (one factor given the other), with the penalty relative
    to the diagonal of the Gram matrix, which amounts to rows of `M` of unit norm.

    Parameters
    ----------
    gram : array of shape (rows, rows)
        ``M Mᵀ``.
    cross : array of shape (rows, columns)
        ``M W``.
    state : SparseState
        Solution and dual to start from, of shape (rows, columns). On NumPy they are overwritten.
    constraint : Constraint
        Set of `X`, whose ``support`` is chosen anew at every step.
    penalties : sequence of float
        Positive penalty ρ of each step, relative to the diagonal of `gram`. Steps may differ:
        a small one lets unused entries grow back, a larger one settles the support.

    Returns
    -------
    SparseState
        The state after the last step.
    """
    xp = backend.namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    diagonal = xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal))
    norms = xp.sqrt(diagonal)
    for penalty in penalties:
        rhs = kernels.consensus_target(cross, state.values, state.support, penalty * diagonal)
        rhs = backend.spd_solve(backend.add_diagonal(gram, (penalty + DAMPING) * diagonal), rhs)
        values, scores = kernels.absorb_step(rhs, state.values, state.support, norms)
        state = SparseState(values, constraint.support(scores))
        del rhs, scores  # memory
    return state
