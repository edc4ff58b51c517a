"""Double sparse factorization: the product of two sparse matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matfact import backend, kernels
from matfact.backend import Array
from matfact.constraints import Constraint, CountedSparsity, GlobalSparsity, transposed
from matfact.solvers._callback import Callback
from matfact.solvers.admm import SparseState, sparse_regression
from matfact.solvers.least_squares import refit_values
from matfact.solvers.svd import truncated_svd

#: Penalty of the first ADMM step of a sweep, in the first and last sweep; geometric in between.
EXPLORE = (0.04, 0.6)
#: Penalty of the second step.
SETTLE = 0.9
#: Nonzeros allowed in the first sweep, growing linearly to all of them: this share, plus this many
#: nonzeros per row of the square factor.
INITIAL_SHARE, INITIAL_EXTRA = 0.5, 2.4
#: Share of the sweeps after which the schedule has reached its end.
ANNEALED = 0.95
#: Row norms are normalized only outside of [1 / this, this].
DRIFT = 64.0
#: Conjugate gradient steps on the values of each factor, once the supports are found.
REFIT_STEPS = 4


def dsf(
    W: Array,
    left: Constraint,
    right: Constraint,
    *,
    max_iter: int = 100,
    callback: Callback | None = None,
) -> tuple[Array, Array, int]:
    """Approximate `W` by the product of two sparse matrices.

    Source: Boža & Macko 2025, algorithm 1: alternating sparse regressions by ADMM, starting from
    ``W ≈ I · (largest entries of W)``. Only the schedule differs. Each sweep takes two steps per
    factor: one with a small penalty, which lets entries outside the support grow back, and one with
    a large penalty, which settles it. The factors start sparser than allowed and fill up, so that
    late nonzeros go where the early ones leave the largest error.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite real matrix with no more rows than columns.
    left, right : Constraint
        Constraints on the supports of the factors.
    max_iter : int
        Number of sweeps. The schedule stretches over them, so more sweeps find better supports.
    callback : callable, optional
        Called after every sweep with its number and the objective ``‖W − A B‖_F²``.

    Returns
    -------
    left : array of shape (rows, rows)
        `A`, zero off its support.
    right : array of shape (rows, columns)
        `B`, zero off its support.
    n_iter : int
        Number of sweeps, less than `max_iter` if the product became exact.
    """
    xp = backend.namespace(W)
    W_transposed = xp.matrix_transpose(W)
    side = W.shape[0]
    eye = xp.eye(side, dtype=W.dtype, device=backend.device(W))
    # The solver stores A transposed, so that each factor is the unknown X of Mᵀ X ≈ target.
    left = transposed(left)
    values = xp.asarray(backend.contiguous(W), copy=True)  # overwritten
    A, B = SparseState(eye, eye != 0), SparseState(values, right.support(W))
    del eye, values  # memory, as below
    energy, eps = backend.norm(W) ** 2, float(xp.finfo(W.dtype).eps)
    gram, cross = kernels.normal_equations(B.values, B.support, W_transposed)
    for sweep, (time, penalties) in enumerate(_schedule(max_iter), start=1):
        A = sparse_regression(gram, cross, A, _growing(left, (side, side), time), penalties)
        del gram, cross
        gram_left, cross = kernels.normal_equations(A.values, A.support, W)
        B = sparse_regression(gram_left, cross, B, _growing(right, W.shape, time), penalties)
        explained = kernels.supported_inner(cross, B.support, B.values)
        del cross
        gram, cross = kernels.normal_equations(B.values, B.support, W_transposed)
        norms = _row_norms(gram)
        explained, made, least, most = backend.numbers(
            explained, backend.inner(gram_left, gram), xp.min(norms), xp.max(norms)
        )
        objective = max(0.0, energy - 2 * explained + made)
        del gram_left
        if objective <= energy * eps**0.5:  # such a difference is mostly rounding
            product = xp.matmul(xp.matrix_transpose(A.solution), B.solution)
            objective = backend.norm(W - product) ** 2
        if callback is not None:
            callback(sweep, objective)
        if objective <= energy * eps**2:
            break
        if not (most < DRIFT and least > 1 / DRIFT):
            A, B, gram, cross = _rescaled(A, B, gram, cross, norms)
    del gram, cross
    B = _refitted(B, A, W)
    A = _refitted(A, B, W_transposed)
    return *_balanced(xp.matrix_transpose(A.values), B.values), sweep


def _refitted(state: SparseState, other: SparseState, target: Array) -> SparseState:
    """Improve the values of `state` on its support, given the `other` factor."""
    gram, residual = kernels.normal_equations(other.values, other.support, target)
    values = backend.zeroed(state.values, state.support)
    residual -= backend.namespace(values).matmul(gram, values)
    values = refit_values(gram, residual, values, state.support, REFIT_STEPS)
    return SparseState(values, state.support)


def pruned(W: Array, n_values: int) -> tuple[Array, Array]:
    """Return a diagonal that selects rows, and the largest entries of `W` in these rows.

    This simplest product of two sparse matrices is better than `dsf` at densities of a few
    percent.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix.
    n_values : int
        Maximum number of nonzeros of both factors together, at least 2.

    Returns
    -------
    left : array of shape (rows, rows)
        The diagonal factor.
    right : array of shape (rows, columns)
        The pruned matrix.
    """
    xp = backend.namespace(W)
    kept = max(n_values - W.shape[0], n_values // 2)  # a row needs an entry on the diagonal
    right = GlobalSparsity(kept).project(W)
    used = xp.astype(xp.any(right != 0, axis=1), W.dtype)
    return xp.eye(W.shape[0], dtype=W.dtype, device=backend.device(W)) * used, right


def thin(W: Array, n_left: int, n_right: int) -> list[Array]:
    """Return the best low-rank factors, padded with zeros to the shapes of sparse factors.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix.
    n_left, n_right : int
        Maximum number of nonzeros of each factor. The factors are 0 if these are too few for a
        column and a row.
    """
    xp = backend.namespace(W)
    rank = min(n_left // W.shape[0], n_right // W.shape[1], *W.shape)
    left, right = truncated_svd(W, max(1, rank))
    rank = min(rank, left.shape[1])
    rest = (W.shape[0], W.shape[0] - rank), (W.shape[0] - rank, W.shape[1])
    zeros = [xp.zeros(shape, dtype=W.dtype, device=backend.device(W)) for shape in rest]
    return [
        xp.concat([left[:, :rank], zeros[0]], axis=1),
        xp.concat([right[:rank, :], zeros[1]], axis=0),
    ]


def _row_norms(gram: Array) -> Array:
    """Return the norms of the rows of a matrix from its Gram matrix, 1 for those of zeros."""
    xp = backend.namespace(gram)
    norms = xp.sqrt(xp.linalg.diagonal(gram))
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def _rescaled(
    A: SparseState, B: SparseState, gram: Array, cross: Array, norms: Array
) -> tuple[SparseState, SparseState, Array, Array]:
    """Divide the rows of `B` by their norms, once one has drifted out of range."""
    return (
        dataclasses.replace(A, values=A.values * norms[:, None]),
        dataclasses.replace(B, values=B.values / norms[:, None]),
        gram / (norms[:, None] * norms[None, :]),
        cross / norms[:, None],
    )


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Give the columns of one factor and the matching rows of the other equal norms."""
    xp = backend.namespace(left)
    norms = xp.linalg.vector_norm(left, axis=0), xp.linalg.vector_norm(right, axis=1)
    used = (norms[0] > 0) & (norms[1] > 0)
    ones = xp.ones_like(norms[0])
    scale = xp.sqrt(xp.where(used, norms[0], ones) / xp.where(used, norms[1], ones))
    return left / scale, right * scale[:, None]


def _schedule(max_iter: int) -> Iterator[tuple[float, tuple[float, float]]]:
    """Yield the progress of the schedule, from 0 to 1, and the penalties of each sweep."""
    for sweep in range(1, max_iter + 1):
        time = min(1.0, sweep / (ANNEALED * max_iter))
        yield time, (EXPLORE[0] * (EXPLORE[1] / EXPLORE[0]) ** time, SETTLE)


def _growing(constraint: Constraint, shape: tuple[int, int], time: float) -> Constraint:
    """Return `constraint` with the number of nonzeros that the schedule allows at `time`."""
    if not isinstance(constraint, CountedSparsity):  # fixed
        return constraint
    initial = min(1.0, INITIAL_SHARE + INITIAL_EXTRA * shape[0] / constraint.nnz(shape))
    share = initial + (1.0 - initial) * time
    return constraint.with_share(share)
