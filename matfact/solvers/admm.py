"""Sparse regression by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matfact import backend, kernels
from matfact.backend import Array
from matfact.constraints import Constraint

#: Share of the diagonal added to every Gram matrix to keep it positive definite (Boža & Macko
#: 2025).
DAMPING = 0.02


@dataclasses.dataclass(frozen=True)
class SparseState:
    """State of ADMM: the sparse solution on `support`, the scaled dual off it.

    One array holds both. They never overlap, since the projection keeps the solution on the
    support and moves the rest to the dual.
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
    """Minimize ``‖Mᵀ X − W‖_F²`` over `X` with a constrained support, one ADMM step per penalty.

    Source: Boža & Macko 2025, algorithm 1 (one factor given the other). The penalty is relative to
    the diagonal of the Gram matrix, as if the rows of `M` had unit norm.

    Parameters
    ----------
    gram : array of shape (rows, rows)
        ``M Mᵀ``.
    cross : array of shape (rows, columns)
        ``M W``.
    state : SparseState
        Initial solution and dual, of shape (rows, columns). Overwritten in NumPy.
    constraint : Constraint
        Constraint on `X`; its ``support`` is chosen again in every step.
    penalties : sequence of float
        Positive penalty ρ of each step, relative to the diagonal of `gram`. Small penalties let
        unused entries grow back, larger ones settle the support.

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
