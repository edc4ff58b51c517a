"""Sparse regression by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matfact import backend, kernels
from matfact.backend import Array
from matfact.constraints import Constraint

#: Share of the diagonal added to every Gram matrix: paper 001 keeps it positive definite so.
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
        xp = backend.namespace(self.values)
        return xp.where(self.support, self.values, xp.zeros_like(self.values))


def sparse_regression(
    gram: Array,
    cross: Array,
    state: SparseState,
    constraint: Constraint,
    penalties: Sequence[float],
) -> SparseState:
    """Lower ``‖Mᵀ X − W‖_F²`` over `X` with a constrained support, one step for each penalty.

    Source: paper 001, algorithm 1 (one factor given the other), with the penalty relative to the
    diagonal of the Gram matrix, which amounts to rows of `M` of unit norm.

    Parameters
    ----------
    gram : array of shape (rows, rows)
        ``M Mᵀ``.
    cross : array of shape (rows, columns)
        ``M W``.
    state : SparseState
        Solution and dual to start from, of shape (rows, columns).
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
        del rhs, values, scores  # memory for the next step
    return state


def refit_values(gram: Array, residual: Array, X: Array, support: Array, n_steps: int) -> Array:
    """Lower ``‖Mᵀ X − W‖_F²`` over the values of `X` on a fixed support.

    Conjugate gradients: every step lowers the objective, however few there are.

    Parameters
    ----------
    gram : array of shape (rows, rows)
        ``M Mᵀ``.
    residual : array of shape (rows, columns)
        ``M W − M Mᵀ X``, minus half the gradient. Overwritten, to save memory.
    X : array of shape (rows, columns)
        Values to start from, zero off the support. Overwritten with the values.
    support : array of bool, of shape (rows, columns)
        Where `X` may be nonzero.
    n_steps : int
        Number of steps.

    Returns
    -------
    array of shape (rows, columns)
        `X`, zero off the support.
    """
    xp = backend.namespace(X)
    zero = xp.zeros((), dtype=X.dtype, device=backend.device(X))
    residual *= xp.astype(support, X.dtype)
    direction = xp.asarray(residual, copy=True)
    energy = backend.inner(residual, residual)
    negligible = energy * float(xp.finfo(X.dtype).eps) ** 2
    for _ in range(n_steps):
        image = xp.where(support, xp.matmul(gram, direction), zero)
        curvature = backend.inner(direction, image)
        if energy <= negligible or curvature <= 0.0:  # nothing left to gain
            break
        X += (energy / curvature) * direction
        image *= energy / curvature
        residual -= image
        del image
        previous, energy = energy, backend.inner(residual, residual)
        direction *= energy / previous
        direction += residual
    return X
