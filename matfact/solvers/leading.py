"""Leading singular vectors of many blocks at once."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array

#: Largest side of a Gram matrix for which squaring is faster than eigenvectors.
_SQUARING_SIDE = 32
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
        Orthonormal columns (possibly zero for a zero block).
    """
    rows, columns = blocks.shape[-2:]
    if rows <= columns:
        return _leading_vectors(blocks, rank)
    right = _leading_vectors(adjoint(blocks), rank)
    return orthonormal(backend.namespace(blocks).matmul(blocks, right))


def improved_range(blocks: Array, basis: Array) -> Array:
    """Return `basis` after a step of the power method.

    This restores directions with singular values below the square root of the precision, which the
    Gram matrices of `leading_range` lose. Blocks of low rank are then spanned to rounding.
    """
    xp = backend.namespace(blocks)
    return orthonormal(xp.matmul(blocks, xp.matmul(adjoint(blocks), basis)))


def _leading_vectors(blocks: Array, rank: int) -> Array:
    """Return the `rank` leading left singular vectors of blocks with few rows."""
    xp = backend.namespace(blocks)
    if rank == 1 and blocks.shape[-2] <= _SQUARING_SIDE:
        return leading_vector(xp.matmul(blocks, adjoint(blocks)))
    precise = backend.wide(blocks)
    vectors = xp.linalg.eigh(xp.matmul(precise, adjoint(precise)))[1]
    return xp.astype(xp.flip(vectors[..., -rank:], axis=-1), blocks.dtype)


def leading_vector(gram: Array) -> Array:
    """Return the leading eigenvector of each positive semidefinite matrix.

    Squaring a matrix k times equals 2ᵏ steps of the power method, so a few batched products
    separate even close eigenvalues to rounding.

    Parameters
    ----------
    gram : array of shape (…, n, n)
        Hermitian positive semidefinite matrices.

    Returns
    -------
    array of shape (…, n, 1)
        Unit eigenvectors, or zeros for zero matrices.
    """
    n = gram.shape[-1]
    if n == 2:
        return _leading_of_two(gram)
    xp = backend.namespace(gram)
    power = xp.reshape(gram, (-1, n, n))
    power = _over(power, _trace(power))
    squared = _squared_on_host if backend.is_on_host(gram) else _squared
    return xp.reshape(orthonormal(_largest_column(squared(power))), (*gram.shape[:-1], 1))


def _squared(power: Array) -> Array:
    """Return the limit of repeated squaring, without waiting for news of convergence."""
    for _ in range(_MAX_SQUARINGS):
        power = backend.namespace(power).matmul(power, power)
        power = _over(power, _trace(power))
    return power


def _squared_on_host(power: Array) -> Array:
    """Return the limit of repeated squaring, of each matrix until it has converged."""
    xp, n = backend.namespace(power), power.shape[-1]
    places, projectors, waiting = [], [], np.arange(power.shape[0])
    for squaring in range(_MAX_SQUARINGS):
        power = xp.matmul(power, power)
        trace = _trace(power)  # Σ λ² with Σ λ = 1: equals 1 only for a single nonzero eigenvalue
        is_done = backend.to_numpy((trace == 0) | (1 - trace < n * xp.finfo(trace.dtype).eps))
        power = _over(power, trace)
        if squaring == _MAX_SQUARINGS - 1:
            is_done[:] = True
        if 4 * np.count_nonzero(is_done) < is_done.size:
            continue  # too few have converged to pay for compacting the rest
        projectors.append(_rows(power, is_done))
        places.append(waiting[is_done])
        waiting, power = waiting[~is_done], _rows(power, ~is_done)
        if not waiting.size:
            break
    order = np.argsort(np.concatenate(places))
    return xp.take(xp.concat(projectors), backend.like(order, projectors[0]), axis=0)


def _leading_of_two(gram: Array) -> Array:
    """Return the leading eigenvector of 2×2 matrices ``[[p, q], [q̄, r]]`` in closed form."""
    xp = backend.namespace(gram)
    q = gram[..., 0, 1]
    difference = _real(gram[..., 0, 0] - gram[..., 1, 1]) / 2
    radius = xp.hypot(difference, xp.abs(q))
    large = xp.astype(radius + xp.abs(difference), gram.dtype)  # the sum without cancellation
    first = difference >= 0
    vector = xp.stack([xp.where(first, large, q), xp.where(first, conj(q), large)], axis=-1)
    # Multiples of the identity, including zero, define no vector: take the first axis.
    unit = xp.astype(_real(gram[..., :, 0]) > 0, gram.dtype)
    return orthonormal(xp.where(radius[..., None] > 0, vector, unit)[..., None])


def orthonormal(columns: Array) -> Array:
    """Return an orthonormal basis of the columns of each block."""
    xp = backend.namespace(columns)
    if columns.shape[-1] > 1:
        return xp.linalg.qr(columns)[0]
    squares = _real(xp.vecdot(columns, columns, axis=-2))[..., None, :]
    scales = 1 / xp.sqrt(xp.where(squares == 0, xp.ones_like(squares), squares))
    return columns * xp.astype(scales, columns.dtype, copy=False)


def adjoint(blocks: Array) -> Array:
    """Return the conjugate transpose of each block."""
    return conj(backend.namespace(blocks).matrix_transpose(blocks))


def conj(array: Array) -> Array:
    """Return the complex conjugate of `array`, itself if it is real."""
    return backend.namespace(array).conj(array) if backend.is_complex(array) else array


def _real(array: Array) -> Array:
    """Return the real part of `array`, itself if it is real."""
    return backend.namespace(array).real(array) if backend.is_complex(array) else array


def _trace(matrices: Array) -> Array:
    """Return the real trace of each matrix."""
    return _real(backend.namespace(matrices).linalg.trace(matrices))


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
    diagonal = _real(xp.linalg.diagonal(projectors))
    position = xp.argmax(diagonal, axis=-1, keepdims=True)
    counter = xp.arange(diagonal.shape[-1], device=backend.device(projectors))
    is_largest = xp.astype(counter == position, projectors.dtype)
    return xp.matmul(projectors, is_largest[..., None])
