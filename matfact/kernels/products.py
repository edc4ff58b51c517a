"""Products with a mostly zero matrix."""

from __future__ import annotations

import functools

import numpy as np

from matfact import backend
from matfact._threads import allowed_threads
from matfact.backend import Array
from matfact.kernels.atomics import fetch_add
from matfact.kernels.compilation import compiled
from matfact.kernels.threads import run

#: Density from which the dense product is faster.
DENSE = 0.25
#: Maximum number of columns multiplied at a time, so that they stay in the cache.
PANEL = 256
#: Minimum number of entries of a product per thread.
SMALL = 1 << 18


def normal_equations(values: Array, support: Array, W: Array) -> tuple[Array, Array]:
    """Return ``M Mᵀ`` and ``M W``, where `M` holds `values` on `support` and 0 elsewhere.

    Parameters
    ----------
    values : array of shape (rows, inner)
        Entries of `M`; entries off `support` are ignored.
    support : array of bool, of shape (rows, inner)
        Where `M` may be nonzero.
    W : array of shape (inner, columns)
        Dense matrix. In NumPy, C-contiguous or the transpose of a C-contiguous matrix.
    """
    xp = backend.namespace(values)
    if backend.is_numpy(values):
        nnz = int(np.count_nonzero(support))
        if nnz <= DENSE * values.size:
            return _sparse_normal_equations(values, support, nnz, W)
    M = backend.restricted(values, support)
    return xp.matmul(M, xp.matrix_transpose(M)), xp.matmul(M, W)


def supported_inner(values: Array, support: Array, other: Array) -> Array:
    """Return the inner product of `values` and `other` over `support`, not read yet.

    As `matfact.backend.inner` does.
    """
    if backend.is_numpy(values):
        return float(_supported_inner(values, support, other))
    xp = backend.namespace(values)
    return xp.sum(xp.where(support, values * other, xp.zeros_like(values)))


def _sparse_normal_equations(
    values: np.ndarray, support: np.ndarray, nnz: int, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rows, inner = values.shape
    indptr = np.empty(rows + 1, np.uint64)
    # One extra entry: every entry is written, then kept or overwritten.
    indices, data = np.empty(nnz + 1, np.uint32), np.empty(nnz + 1, values.dtype)
    transposed = np.zeros((inner, rows), values.dtype)
    _compress(values, support, indptr, indices, data, transposed)
    gram, cross = np.empty((rows, rows), values.dtype), np.empty((rows, W.shape[1]), values.dtype)
    for dense, product in ((transposed, gram), (W, cross)):
        _multiply(indptr, indices, data, dense, product)
    return gram, cross


def _multiply(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, dense: np.ndarray, out: np.ndarray
) -> None:
    """Write the product of a CSR matrix and a dense matrix to `out`."""
    # The thread count of BLAS, presumably: both are set together (see matfact._threads).
    threads = min(allowed_threads(), max(1, out.size // SMALL))
    width = min(PANEL, -(-out.shape[1] // threads))
    arguments = (indptr, indices, data, dense, width, np.zeros(1, np.int64), out)
    run([functools.partial(_multiply_panels, *arguments)] * threads)


@compiled()
def _compress(values, support, indptr, indices, data, transposed):  # type: ignore[no-untyped-def]
    """Write the matrix in compressed sparse rows, and its transpose as a dense array."""
    k = 0
    for i in range(values.shape[0]):
        indptr[i] = k
        for j in range(values.shape[1]):
            indices[k] = j
            data[k] = values[i, j]
            k += support[i, j]
        for position in range(indptr[i], k):
            transposed[indices[position], i] = data[position]
    indptr[values.shape[0]] = k


@compiled()
def _multiply_panels(indptr, indices, data, dense, width, taken, out):  # type: ignore[no-untyped-def]
    """Compute panels of columns that no other thread has taken."""
    buffer = np.empty(dense.shape[0] * width, dense.dtype)
    while True:
        start = fetch_add(taken, 0, 1) * width
        if start >= out.shape[1]:
            break
        stop = min(start + width, out.shape[1])
        # Packed, since rows a power of two apart would collide in the cache.
        panel = buffer[: dense.shape[0] * (stop - start)]
        panel.reshape(dense.shape[0], stop - start)[:] = dense[:, start:stop]
        _multiply_panel(indptr, indices, data, panel, out, start, stop)


# Unsigned positions need no test for negative ones, which would prevent vectorization. Eight rows
# are added at a time, so that sums are loaded and stored less often.
@compiled(fastmath={"contract"})
def _multiply_panel(indptr, indices, data, panel, out, start, stop):  # type: ignore[no-untyped-def]
    """Write the product with a flat panel to columns `start` to `stop` of `out`."""
    u = np.uint64
    width = u(stop - start)
    for i in range(out.shape[0]):
        total = out[i, start:stop]
        total[:] = 0
        k, end = indptr[i], indptr[i + 1]
        while k + u(8) <= end:
            a, b, c, d = data[k], data[k + u(1)], data[k + u(2)], data[k + u(3)]
            e, f, g, h = data[k + u(4)], data[k + u(5)], data[k + u(6)], data[k + u(7)]
            p, q = u(indices[k]) * width, u(indices[k + u(1)]) * width
            r, s = u(indices[k + u(2)]) * width, u(indices[k + u(3)]) * width
            t, v = u(indices[k + u(4)]) * width, u(indices[k + u(5)]) * width
            w, x = u(indices[k + u(6)]) * width, u(indices[k + u(7)]) * width
            for j in range(width):
                total[j] += (
                    (a * panel[p + j] + b * panel[q + j])
                    + (c * panel[r + j] + d * panel[s + j])
                    + (e * panel[t + j] + f * panel[v + j])
                    + (g * panel[w + j] + h * panel[x + j])
                )
            k += u(8)
        while k < end:
            a, p = data[k], u(indices[k]) * width
            for j in range(width):
                total[j] += a * panel[p + j]
            k += u(1)


@compiled(fastmath={"contract", "reassoc"})
def _supported_inner(values, support, other):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            total += values[i, j] * other[i, j] if support[i, j] else 0.0
    return total
