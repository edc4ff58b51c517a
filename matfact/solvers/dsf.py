"""Double sparse factorization: one sparse matrix times another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from matfact import backend
from matfact.backend import Array
from matfact.constraints import GlobalSparsity
from matfact.solvers._callback import Callback
from matfact.solvers.admm import SparseState, refit_values, sparse_regression

#: Penalty of the first ADMM step of a sweep, and of the second, in the first and the last sweep;
#: geometric in between.
EXPLORE = (0.03, 0.75)
SETTLE = (1.2, 0.84)
#: The share of the nonzeros allowed in the first sweep, which grows linearly to all of them: the
#: first number, and so many nonzeros more in each row of the square factor.
INITIAL_SHARE, INITIAL_EXTRA = 0.5, 2.4
#: Share of the sweeps after which penalties and supports stay as they end.
ANNEALED = 0.95
#: Conjugate gradient steps on the values of each factor once the supports are found.
REFIT_STEPS = 4


def dsf(
    W: Array,
    left_nnz: int,
    right_nnz: int,
    *,
    max_iter: int = 100,
    callback: Callback | None = None,
) -> tuple[Array, Array, int]:
    """Approximate `W` by the product of two sparse matrices.

    Source: paper 001, algorithm 1, alternating sparse regressions by ADMM from
    ``W ≈ I · (largest entries of W)``. What differs is the schedule. Each sweep takes two steps
    per factor, one with a small penalty that lets entries outside the support grow back and one
    with a large penalty that settles it; and the factors start sparser than allowed and fill up,
    so that late nonzeros go where the early ones leave most to explain.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite real matrix with no more rows than columns.
    left_nnz, right_nnz : int
        Most nonzeros of either factor, at least 1.
    max_iter : int
        Number of sweeps. The schedule stretches over them: more sweeps find better supports.
    callback : callable, optional
        Called with the number of every sweep and the objective ``‖W − A B‖_F²`` after it.

    Returns
    -------
    left : array of shape (rows, rows)
        `A`, zero off its support.
    right : array of shape (rows, columns)
        `B`, zero off its support.
    n_iter : int
        Sweeps made: fewer than `max_iter` when the product has become exact.
    """
    xp = backend.namespace(W)
    W = backend.contiguous(W)
    eye = xp.eye(W.shape[0], dtype=W.dtype, device=backend.device(W))
    # The solver works on A transposed, so that either factor is the unknown of Mᵀ X ≈ target.
    A = SparseState(eye, eye != 0)
    B = SparseState(W, GlobalSparsity(right_nnz).support(W))
    energy = backend.norm(W) ** 2
    negligible = energy * float(xp.finfo(W.dtype).eps) ** 2
    gram = _gram(B.solution)
    initial_share = min(1.0, INITIAL_SHARE + INITIAL_EXTRA * W.shape[0] / left_nnz)
    for sweep, (share, penalties) in enumerate(_schedule(max_iter, initial_share), start=1):
        cross = xp.matmul(B.solution, xp.matrix_transpose(W))
        A = sparse_regression(gram, cross, A, _grown(left_nnz, share), penalties)
        gram_left, cross = _gram(A.solution), xp.matmul(A.solution, W)
        B = sparse_regression(gram_left, cross, B, _grown(right_nnz, share), penalties)
        gram = _gram(B.solution)
        explained = 2 * float(xp.sum(cross * B.solution)) - float(xp.sum(gram_left * gram))
        objective = max(0.0, energy - explained)
        if callback is not None:
            callback(sweep, objective)
        if objective <= negligible:
            break
        A, B, gram = _balanced(A, B, gram)
    right = refit_values(gram_left, cross, B.solution, B.support, REFIT_STEPS)
    cross = xp.matmul(right, xp.matrix_transpose(W))
    left = refit_values(_gram(right), cross, A.solution, A.support, REFIT_STEPS)
    return xp.matrix_transpose(left), right, sweep


def pruned(W: Array, n_values: int) -> tuple[Array, Array]:
    """Return the largest entries of `W` behind a diagonal that selects their rows.

    The simplest product of two sparse matrices, better than :func:`dsf` where only a few percent
    of the values may be stored.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix.
    n_values : int
        Most nonzeros of both factors together, at least 2.

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


def _balanced(
    A: SparseState, B: SparseState, gram: Array
) -> tuple[SparseState, SparseState, Array]:
    """Give the rows of `B` unit norm, lest they drift out of range over many sweeps."""
    xp = backend.namespace(gram)
    norms = xp.sqrt(xp.linalg.diagonal(gram))
    norms = xp.where(norms > 0, norms, xp.ones_like(norms))
    return (
        dataclasses.replace(A, values=A.values * norms[:, None]),
        dataclasses.replace(B, values=B.values / norms[:, None]),
        gram / (norms[:, None] * norms[None, :]),
    )


def _gram(M: Array) -> Array:
    xp = backend.namespace(M)
    return xp.matmul(M, xp.matrix_transpose(M))


def _schedule(max_iter: int, initial_share: float) -> Iterator[tuple[float, tuple[float, float]]]:
    """Yield the share of the nonzeros allowed and the penalties of each sweep."""
    for sweep in range(1, max_iter + 1):
        time = min(1.0, sweep / (ANNEALED * max_iter))
        penalties = (_geometric(*EXPLORE, time), _geometric(*SETTLE, time))
        yield initial_share + (1.0 - initial_share) * time, penalties


def _geometric(start: float, end: float, time: float) -> float:
    return start * (end / start) ** time


def _grown(nnz: int, share: float) -> GlobalSparsity:
    return GlobalSparsity(max(1, round(nnz * share)))
