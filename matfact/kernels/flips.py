"""ADMM and descent over matrices of signs.

The consensus variable of ADMM is ``Z = sign(V) · u vᵀ`` and its scaled dual ``U = V − Z``, so that
an array and two vectors hold both.
"""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.kernels.compilation import compiled

#: Gains below this share of a flip's own cost are rounding.
_GAIN = 1e-5


def sign_target(cross: Array, V: Array, u: Array, v: Array, weights: Array) -> Array:
    """Return ``cross + diag(weights) (Z − U)``, the right side of the ridge step.

    Parameters
    ----------
    cross, V : array of shape (rows, columns)
        Cross product of the regression, and the state.
    u, v : array of shape (rows,) and (columns,)
        Magnitudes of the state's solution.
    weights : array of shape (rows,)
        Penalty of each row.
    """
    if backend.is_numpy(V):
        out = np.empty_like(cross)
        _sign_target(cross, V, u, v, weights, out)
        return out
    return cross + weights[:, None] * (2 * _solution(V, u, v) - V)


def absorb_signs(Y: Array, V: Array, u: Array, v: Array) -> Array:
    """Return the new state ``Y + U``.

    Parameters
    ----------
    Y : array of shape (rows, columns)
        Solution of the ridge step.
    V : array of shape (rows, columns)
        The state, which on NumPy is overwritten with the new one.
    u, v : array of shape (rows,) and (columns,)
        Magnitudes of the state's solution.
    """
    if backend.is_numpy(V):
        _absorb_signs(Y, V, u, v)
        return V
    return Y + V - _solution(V, u, v)


def _solution(V: Array, u: Array, v: Array) -> Array:
    xp = backend.namespace(V)
    return xp.where(V < 0, -xp.ones_like(V), xp.ones_like(V)) * u[:, None] * v[None, :]


@compiled()
def _sign_target(cross, V, u, v, weights, out):  # type: ignore[no-untyped-def]
    two = V.dtype.type(2)
    for i in range(V.shape[0]):
        double = two * u[i]
        for j in range(V.shape[1]):
            magnitude = double * v[j]
            Z = -magnitude if V[i, j] < 0 else magnitude
            out[i, j] = cross[i, j] + weights[i] * (Z - V[i, j])


@compiled()
def _absorb_signs(Y, V, u, v):  # type: ignore[no-untyped-def]
    for i in range(V.shape[0]):
        for j in range(V.shape[1]):
            magnitude = u[i] * v[j]
            V[i, j] += Y[i, j] + magnitude if V[i, j] < 0 else Y[i, j] - magnitude


@compiled()
def flip_rows(S, gradient, gram, passes):  # type: ignore[no-untyped-def]
    """Flip signs of each row `s` of `S`, in place, while that lowers ``s G sᵀ − 2 c sᵀ``.

    Parameters
    ----------
    S, gradient : ndarray of shape (rows, k)
        The signs, and ``S G − C``, both overwritten.
    gram : ndarray of shape (k, k)
        `G`.
    passes : int
        Passes over the signs of a row, at most.
    """
    k = S.shape[1]
    for i in range(S.shape[0]):
        for _ in range(passes):
            flipped = False
            for j in range(k):
                if gram[j, j] * (1 + _GAIN) < S[i, j] * gradient[i, j]:
                    change = -2 * S[i, j]
                    S[i, j] = -S[i, j]
                    flipped = True
                    for other in range(k):
                        gradient[i, other] += change * gram[j, other]
            if not flipped:
                break


@compiled()
def flip_in_metric(F, gradient, gram, metric, passes):  # type: ignore[no-untyped-def]
    """Flip signs of `F`, in place, while that lowers ``tr (W − A F) H (W − A F)ᵀ``.

    Parameters
    ----------
    F, gradient : ndarray of shape (k, columns)
        Signs times a scale for each column, and ``Aᵀ(A F − W) H``, both overwritten.
    gram : ndarray of shape (k, k)
        ``AᵀA``.
    metric : ndarray of shape (columns, columns)
        `H`.
    passes : int
        Passes over all signs, at most.
    """
    k, columns = F.shape
    for _ in range(passes):
        flipped = False
        for j in range(k):
            for c in range(columns):
                own = gram[j, j] * metric[c, c] * abs(F[j, c])
                if own * (1 + _GAIN) < gradient[j, c] * np.sign(F[j, c]):
                    change = -2 * F[j, c]
                    F[j, c] = -F[j, c]
                    flipped = True
                    for i in range(k):
                        scaled = change * gram[i, j]
                        for other in range(columns):
                            gradient[i, other] += scaled * metric[c, other]
        if not flipped:
            break
