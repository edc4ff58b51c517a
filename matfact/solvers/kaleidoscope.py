"""Kaleidoscope products: powers of butterflies times reversed butterflies."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.solvers._callback import Callback, History
from matfact.solvers.butterfly import butterfly
from matfact.solvers.chains import Chain
from matfact.solvers.descent import descend, loss_and_gradient
from matfact.solvers.fourier import convolution, radices, real_part

#: Sweeps for the butterflies that a fit may start from.
_SWEEPS = 3


def kaleidoscope(
    W: Array,
    n: int,
    *,
    width: int = 1,
    complex_pairs: bool = False,
    max_iter: int = 100,
    tol: float = 1e-3,
    callback: Callback,
) -> tuple[list[Array], int]:
    """Approximate `W` by a kaleidoscope product.

    The product is ``B₁ B₁* ⋯ B_w B_w*`` for butterflies ``B_i`` and reversed ones ``B_i*`` of
    size `n`; neighbours with equal supports are merged. Joint descent improves the best of three
    starting points: the nearest butterfly, the nearest reversed butterfly, and the nearest
    circulant matrix (a Toeplitz matrix if `n` is large enough), diagonalized by Fourier transforms.
    Matrices of these kinds are recovered to rounding.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite matrix, real or complex, approximated by the leading rows and columns.
    n : int
        Size of the butterflies, at least the longer side of `W`; its prime factors are the radices.
    width : int, default=1
        Number of butterflies (and of reversed butterflies).
    complex_pairs : bool, default=False
        Whether the factors of a real `W` represent complex numbers by 2×2 blocks.
    max_iter, tol : int, float
        As in `matfact.solvers.descent.descend`.
    callback : Callback
        Called with 0 before the first step, and after each step.

    Returns
    -------
    values : list of array of shape (a, d, b, c)
        Values of the factors.
    n_iter : int
        Number of steps.
    """
    starts = _butterflies(W, n)
    if backend.is_complex(W) or complex_pairs:
        starts.append(convolution(_mean_diagonals(backend.to_numpy(W), n)))
    for i, start in enumerate(starts):
        start = _widened(start, width)
        start = real_part(start) if complex_pairs else start
        starts[i] = [backend.like(v, W, dtype=W.dtype) for v in start]
    losses = backend.numbers(*(loss_and_gradient(W, start)[0] for start in starts))
    best = starts[losses.index(min(losses))]
    return descend(W, best, max_iter=max_iter, tol=tol, callback=callback)


def _butterflies(W: Array, n: int) -> list[list[np.ndarray]]:
    """Return the factors of the butterfly nearest to `W`, and of the nearest reversed one."""
    xp = backend.namespace(W)
    digits = tuple(radices(n)[::-1])
    chain = Chain(digits, digits, (1,) * (len(digits) - 1))
    padded = xp.zeros((n, n), dtype=W.dtype, device=backend.device(W))
    padded[: W.shape[0], : W.shape[1]] = W
    starts = []
    for target in (padded, xp.matrix_transpose(padded)):
        values, _ = butterfly(target, chain, max_iter=_SWEEPS, callback=History())
        down = [backend.to_numpy(v) for v in values]
        up = [np.broadcast_to(np.eye(v.shape[-1]), v.shape) for v in down[-2::-1]]
        starts.append([*down, *up])
    starts[1] = [np.swapaxes(v, -1, -2) for v in reversed(starts[1])]
    return starts


def _widened(values: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Append identity factors: a butterfly and a reversed one for each pair beyond the first."""
    identities = [np.broadcast_to(np.eye(v.shape[-1]), v.shape) for v in values[1:]]
    return [*values, *identities * (width - 1)]


def _mean_diagonals(W: np.ndarray, n: int) -> np.ndarray:
    """Return the first column of the circulant matrix of size `n` with the nearest corner."""
    rows, columns = np.indices(W.shape)
    place = ((rows - columns) % n).ravel()
    counts = np.maximum(np.bincount(place, minlength=n), 1)
    parts = [
        np.bincount(place, weights=part.ravel(), minlength=n) / counts for part in (W.real, W.imag)
    ]
    return parts[0] + 1j * parts[1] if np.iscomplexobj(W) else parts[0]
