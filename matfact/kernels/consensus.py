"""The elementwise passes of ADMM under a sparsity constraint.

The consensus variable `Z` of ADMM is zero off the support, and its scaled dual `U` is zero on it.
One array `V` therefore holds both: ``Z = V`` on the support and ``U = V`` elsewhere.
"""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.kernels.compilation import compiled


def consensus_target(cross: Array, V: Array, support: Array, weights: Array) -> Array:
    """Return ``cross + diag(weights) (Z − U)``, the right side of the ridge step.

    Parameters
    ----------
    cross, V : array of shape (rows, columns)
        Cross product of the regression, and the state.
    support : array of bool, of shape (rows, columns)
        Mask where the state holds `Z`.
    weights : array of shape (rows,)
        Penalty of each row.
    """
    if backend.is_numpy(V):
        out = np.empty_like(cross)
        _consensus_target(cross, V, support, weights, out)
        return out
    return cross + weights[:, None] * backend.namespace(V).where(support, V, -V)


def absorb_step(Y: Array, V: Array, support: Array, weights: Array) -> tuple[Array, Array]:
    """Return the new state ``Y + U`` and its magnitudes ``diag(weights) |Y + U|``.

    Parameters
    ----------
    Y : array of shape (rows, columns)
        Solution of the ridge step. In NumPy it is overwritten with the magnitudes.
    V, support : array of shape (rows, columns)
        The state, overwritten with the new one in NumPy, and the mask where it holds `Z`.
    weights : array of shape (rows,)
        Nonnegative importance of each row.
    """
    if backend.is_numpy(V):
        _absorb_step(Y, V, support, weights)
        return V, Y
    xp = backend.namespace(V)
    V = Y + xp.where(support, xp.zeros_like(V), V)
    return V, weights[:, None] * xp.abs(V)


@compiled()
def _consensus_target(cross, V, support, weights, out):  # type: ignore[no-untyped-def]
    for i in range(V.shape[0]):
        for j in range(V.shape[1]):
            pull = weights[i] * V[i, j]
            out[i, j] = cross[i, j] + (pull if support[i, j] else -pull)


@compiled()
def _absorb_step(Y, V, support, weights):  # type: ignore[no-untyped-def]
    zero = Y.dtype.type(0)
    for i in range(V.shape[0]):
        for j in range(V.shape[1]):
            value = Y[i, j] + (zero if support[i, j] else V[i, j])
            V[i, j] = value
            Y[i, j] = weights[i] * abs(value)
