"""Best low-rank approximations of a matrix, or of its outputs."""

from __future__ import annotations

from matfact import backend
from matfact.backend import Array


def truncated_svd(W: Array, rank: int) -> tuple[Array, Array]:
    """Return the best approximation of `W` of a given rank, as two factors.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        Finite matrix, real or complex.
    rank : int
        Maximum rank, from 1 to min(out_features, in_features).

    Returns
    -------
    left : array of shape (out_features, r)
        Left singular vectors times the square roots of the singular values. r is `rank`, limited by
        the rank of `W` but at least 1.
    right : array of shape (r, in_features)
        Square roots of the singular values times the right singular vectors.
    """
    xp = backend.namespace(W)
    U, s, Vh = xp.linalg.svd(W, full_matrices=False)
    r = min(rank, max(1, numerical_rank(s, W.shape)))
    root = xp.sqrt(s[:r])
    return U[:, :r] * root, root[:, None] * Vh[:r, :]


def numerical_rank(s: Array, shape: tuple[int, ...]) -> int:
    """Return the number of sorted singular values `s` above rounding error."""
    tolerance = s[0] * (max(shape) * backend.namespace(s).finfo(s.dtype).eps)
    return int(backend.count_nonzero(s > tolerance))


def whitened_svd(W: Array, rank: int, second_moment: Array) -> tuple[Array, Array]:
    """Return the approximation of `W` of a given rank with the smallest output error.

    With `M` the average of ``x xᵀ`` over the layer's inputs, it minimizes the average of
    ``‖W x − Ŵ x‖²``, which is ``‖(W − Ŵ) M^½‖_F²``. The minimizer is `W` projected on the leading
    left singular vectors of ``W M^½``. Nothing is inverted, so `M` may be singular; any remaining
    rank approximates `W` in directions without inputs.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        Finite real matrix.
    rank : int
        Maximum rank, from 1 to min(out_features, in_features).
    second_moment : array of shape (in_features, in_features)
        `M`, or any positive multiple of it, in double precision.

    Returns
    -------
    left, right : array
        As in `truncated_svd`, in the dtype of `W`.
    """
    xp = backend.namespace(W)
    precise = backend.wide(W)
    outputs = xp.matmul(precise, psd_root(second_moment))
    U, s, _ = xp.linalg.svd(outputs, full_matrices=False)
    seen = min(rank, numerical_rank(s, W.shape))
    basis = U[:, :seen]
    if seen < rank:
        unseen = precise - _project(precise, basis)
        U, _, _ = xp.linalg.svd(unseen, full_matrices=False)
        basis, _ = xp.linalg.qr(xp.concat([basis, U[:, : rank - seen]], axis=1))
    left, right = truncated_svd(_project(precise, basis), rank)
    return xp.astype(left, W.dtype), xp.astype(right, W.dtype)


def psd_root(matrix: Array) -> Array:
    """Return a matrix `R` with ``R Rᵀ`` equal to a symmetric positive semidefinite `matrix`."""
    xp = backend.namespace(matrix)
    eigenvalues, Q = xp.linalg.eigh(matrix)
    # Rounding errors in absent directions must not use up rank.
    floor = eigenvalues[-1] * (matrix.shape[0] * xp.finfo(eigenvalues.dtype).eps)
    return Q * xp.sqrt(xp.where(eigenvalues > floor, eigenvalues, 0.0))


def whitening_root(moment: Array) -> Array:
    """Return `psd_root` of `moment`, with directions without inputs ranked last.

    A small multiple of the identity is added to the second moment for them.
    """
    xp = backend.namespace(moment)
    n = moment.shape[0]
    mean = float(xp.linalg.trace(moment)) / n
    ridge = 1e-9 * mean if mean > 0.0 else 1.0
    return psd_root(moment + ridge * xp.eye(n, dtype=moment.dtype, device=backend.device(moment)))


def _project(W: Array, basis: Array) -> Array:
    """Return `W` projected on the span of the orthonormal columns of `basis`."""
    xp = backend.namespace(W)
    return xp.matmul(basis, xp.matmul(xp.matrix_transpose(basis), W))
