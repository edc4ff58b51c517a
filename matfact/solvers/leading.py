"""Leading singular vectors of many blocks at once."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array

#: Largest side of a Gram matrix whose squaring is faster than a singular value decomposition.
_SQUARING_SIDE = 32
#: Ratio of a block's sides below which its Gram matrix replaces the decomposition.
_GRAM_RATIO = 0.25
#: Squarings after which two singular values count as equal.
_MAX_SQUARINGS = 50


def leading_range(blocks: Array, rank: int) -> Array:
    """Return the `rank` leading left singular vectors of each block.

    Parameters
    ----------
    blocks : array of shape (…, rows, columns)
        Finite blocks, real or complex.
    rank : int
        From 1 to min(rows, columns).

    Returns
    -------
    array of shape (…, rows, rank)
        Orthonormal columns (zero ones may stand for those of a zero block).
    """
    xp = backend.namespace(blocks)
    rows, columns = blocks.shape[-2:]
    if rank == 1 and min(rows, columns) <= _SQUARING_SIDE:
        if rows <= columns:
            return leading_vector(xp.matmul(blocks, adjoint(blocks)))
        right = leading_vector(xp.matmul(adjoint(blocks), blocks))
        return orthonormal(xp.matmul(blocks, right))
    if rows > _GRAM_RATIO * columns:
        return xp.linalg.svd(blocks, full_matrices=False)[0][..., :rank]
    gram = xp.matmul(blocks, adjoint(blocks))
    return xp.flip(xp.linalg.eigh(gram)[1][..., -rank:], axis=-1)


def leading_vector(gram: Array) -> Array:
    """Return the leading eigenvector of each positive semidefinite matrix.

    Squaring a matrix k times is 2ᵏ steps of the power method, in a few products of batches of
    matrices, so that even close eigenvalues come apart to rounding.

    Parameters
    ----------
    gram : array of shape (…, n, n)
        Hermitian positive semidefinite matrices.

    Returns
    -------
    array of shape (…, n, 1)
        Unit eigenvectors, or zeros for zero matrices.
    """
    xp = backend.namespace(gram)
    n = gram.shape[-1]
    power = xp.reshape(gram, (-1, n, n))
    power = _over(power, _trace(power))
    places, projectors, waiting = [], [], np.arange(power.shape[0])
    for squaring in range(_MAX_SQUARINGS):
        power = xp.matmul(power, power)
        trace = _trace(power)  # Σ λ² where Σ λ = 1: one if and only if there is one eigenvalue
        is_done = backend.to_numpy((trace == 0) | (1 - trace < n * xp.finfo(trace.dtype).eps))
        power = _over(power, trace)
        if squaring == _MAX_SQUARINGS - 1:
            is_done[:] = True
        if 4 * np.count_nonzero(is_done) < is_done.size:
            continue  # too few to pay for moving the others together
        projectors.append(_rows(power, is_done))
        places.append(waiting[is_done])
        waiting, power = waiting[~is_done], _rows(power, ~is_done)
        if not waiting.size:
            break
    order = np.argsort(np.concatenate(places))
    projector = xp.take(xp.concat(projectors), backend.like(order, gram), axis=0)
    return xp.reshape(orthonormal(_largest_column(projector)), (*gram.shape[:-1], 1))


def orthonormal(columns: Array) -> Array:
    """Return an orthonormal basis of the columns of each block."""
    xp = backend.namespace(columns)
    if columns.shape[-1] > 1:
        return xp.linalg.qr(columns)[0]
    norms = xp.linalg.vector_norm(columns, axis=-2, keepdims=True)
    return columns / xp.where(norms == 0, xp.ones_like(norms), norms)


def adjoint(blocks: Array) -> Array:
    """Return the conjugate transpose of each block."""
    xp = backend.namespace(blocks)
    transposed = xp.matrix_transpose(blocks)
    is_complex = xp.isdtype(blocks.dtype, "complex floating")
    return xp.conj(transposed) if is_complex else transposed


def _trace(matrices: Array) -> Array:
    """Return the real trace of each matrix."""
    xp = backend.namespace(matrices)
    trace = xp.linalg.trace(matrices)
    return xp.real(trace) if xp.isdtype(trace.dtype, "complex floating") else trace


def _over(matrices: Array, traces: Array) -> Array:
    """Divide each matrix by its trace, unless that is zero."""
    xp = backend.namespace(matrices)
    scales = 1 / xp.where(traces == 0, xp.ones_like(traces), traces)
    return matrices * xp.astype(scales, matrices.dtype)[:, None, None]


def _rows(matrices: Array, chosen: np.ndarray) -> Array:
    """Return the chosen matrices of a batch."""
    if chosen.all():
        return matrices
    index = backend.like(np.flatnonzero(chosen), matrices)
    return backend.namespace(matrices).take(matrices, index, axis=0)


def _largest_column(projectors: Array) -> Array:
    """Return the column of each projector with the largest diagonal entry."""
    xp = backend.namespace(projectors)
    diagonal = xp.linalg.diagonal(projectors)
    if xp.isdtype(diagonal.dtype, "complex floating"):
        diagonal = xp.real(diagonal)
    position = xp.argmax(diagonal, axis=-1, keepdims=True)
    counter = xp.arange(diagonal.shape[-1], device=backend.device(projectors))
    is_largest = xp.astype(counter == position, projectors.dtype)
    return xp.matmul(projectors, is_largest[..., None])
