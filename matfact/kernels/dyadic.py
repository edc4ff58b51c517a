"""Compiled identification of butterflies with 2×2 blocks.

Blocks are those of `matfact.solvers.butterfly` with two rows each. Their singular vectors
have a closed form, and a pass reads and writes every entry once. Sums are in double precision.
"""

from __future__ import annotations

import math

import numpy as np

from matfact.kernels.compilation import compiled


def identify(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peel orthonormal factors off `W`.

    Parameters
    ----------
    W : ndarray of shape (n, n)
        C-contiguous, real or complex; n is a power of two, at least 4.

    Returns
    -------
    bases : ndarray of shape (log₂ n − 1, 2 n)
        Values of each factor but the last, flattened.
    last : ndarray of shape (n / 2, 2, 2)
        The last factor.
    """
    n = len(W)
    bases = np.empty((n.bit_length() - 2, 2 * n), W.dtype)
    last = np.empty((n // 2, 2, 2), W.dtype)
    _pass(W, bases, last, np.empty(0, W.dtype))
    return bases, last


def sweep(W: np.ndarray, bases: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace each factor by the best one given the others, and return all."""
    tails = np.empty(len(W) * (len(W) - 2), W.dtype)
    _multiply_tails(bases, last, tails)
    improved, rest = np.empty_like(bases), np.empty_like(last)
    _pass(W, improved, rest, tails)
    return improved, rest


def unpack(bases: np.ndarray) -> list[np.ndarray]:
    """Return each factor's values, of shape (a, d, 2, 2)."""
    return [row.reshape(1 << i, -1, 2, 2) for i, row in enumerate(bases)]


@compiled()
def _pass(W, bases, last, tails):  # type: ignore[no-untyped-def]
    """Find one factor after the other, from `tails` or, if empty, from singular vectors."""
    n, levels = len(W), len(bases)
    rest = W.reshape(1, n, n)
    empty = tails.reshape(1, 1, -1)
    start = 0
    for level in range(levels):
        a, size = 1 << level, n >> (level + 1)
        basis = bases[level].reshape(a, size, 2, 2)
        out = np.empty((2 * a, size, size), W.dtype) if level < levels - 1 else last
        tail = empty
        if tails.size:
            tail = tails[start : start + n * size].reshape(2 * a, size, size)
            start += n * size
        _peel(rest, tail, basis, out)
        rest = out


@compiled(fastmath={"reassoc", "contract"})
def _peel(rest, tail, basis, out):  # type: ignore[no-untyped-def]
    """Find the vector of each block and write the remainder of its two rows."""
    blocks, d, width = out.shape
    for block in range(blocks):
        i, g = block // 2, block % 2
        for k in range(d):
            x = rest[i, k, g * width : (g + 1) * width]
            y = rest[i, d + k, g * width : (g + 1) * width]
            u, v = _fitted(x, y, tail[block, k]) if tail.size else _leading(x, y)
            basis[i, k, 0, g], basis[i, k, 1, g] = u, v
            u, v = np.conj(u), np.conj(v)
            total = out[block, k]
            for c in range(width):
                total[c] = u * x[c] + v * y[c]


@compiled(fastmath={"reassoc", "contract"})
def _leading(x, y):  # type: ignore[no-untyped-def]
    """Return the leading left singular vector of the rows `x` and `y`."""
    p, r, q = 0.0, 0.0, 0.0 * x[0]
    for c in range(len(x)):
        p += x[c].real ** 2 + x[c].imag ** 2
        r += y[c].real ** 2 + y[c].imag ** 2
        q += x[c] * np.conj(y[c])
    half = (p - r) / 2
    large = math.hypot(half, abs(q)) + abs(half)  # the sum without cancellation
    if large == 0.0:  # equal and orthogonal rows, or zeros
        return _unit(0.0 * q + p, 0.0 * q)
    return _unit(0.0 * q + large, np.conj(q)) if half >= 0.0 else _unit(q, 0.0 * q + large)


@compiled(fastmath={"reassoc", "contract"})
def _fitted(x, y, weights):  # type: ignore[no-untyped-def]
    """Return the direction of the best left vector given the right vector `weights`."""
    u = v = 0.0 * x[0]
    for c in range(len(x)):
        u += x[c] * weights[c]
        v += y[c] * weights[c]
    return _unit(u, v)


@compiled()
def _unit(u, v):  # type: ignore[no-untyped-def]
    size = math.sqrt(abs(u) ** 2 + abs(v) ** 2)
    return (u / size, v / size) if size > 0.0 else (u, v)


@compiled()
def _multiply_tails(bases, last, tails):  # type: ignore[no-untyped-def]
    """Write the conjugate product of the factors after each factor to `tails`."""
    n, stop = last.size // 2, tails.size
    tail = np.conj(last)
    for level in range(len(bases) - 1, -1, -1):
        size = n >> (level + 1)
        start = stop - n * size
        tails[start:stop] = tail.ravel()
        stop = start
        if level:
            tail = _grown(np.conj(bases[level]).reshape(1 << level, size, 2, 2), tail)


@compiled()
def _grown(basis, tail):  # type: ignore[no-untyped-def]
    """Return the block-wise product of a factor and its successor."""
    a, d, _, _ = basis.shape
    out = np.empty((a, 2 * d, 2 * d), tail.dtype)
    for i in range(a):
        for g in range(2):
            for k in range(d):
                row = tail[2 * i + g, k]
                for r in range(2):
                    scale, total = basis[i, k, r, g], out[i, r * d + k, g * d : (g + 1) * d]
                    for c in range(d):
                        total[c] = scale * row[c]
    return out
