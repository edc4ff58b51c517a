"""Least squares on a fixed support, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matfact import backend
from matfact.backend import Array


def damped_gram(gram: Array, norms: Array, damping: float, dtype: Any) -> Array:
    """Return the Gram matrix of normalized inputs, made positive definite.

    Parameters
    ----------
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs `X`, or their second moment.
    norms : array of shape (columns,)
        Divisor of each input.
    damping : float
        Added to the diagonal.
    dtype : dtype
        Dtype of the result; only a few rows at a time are in another one.
    """
    xp = backend.namespace(gram)
    result = xp.empty(gram.shape, dtype=dtype, device=backend.device(gram))
    for rows in backend.slabs(gram.shape[0]):
        slab = gram[rows, :] / norms[rows, None] / norms[None, :]
        result[rows, :] = xp.astype(slab, dtype)
        result[rows, rows] = backend.add_diagonal(result[rows, rows], damping)
    return result


def refit_values(gram: Array, residual: Array, X: Array, support: Array, n_steps: int) -> Array:
    """Reduce ``‖Mᵀ X − W‖_F²`` over the values of `X` on a fixed support.

    Parameters
    ----------
    gram : array of shape (rows, rows)
        ``M Mᵀ``.
    residual : array of shape (rows, columns)
        ``M W − M Mᵀ X``, minus half the gradient. Overwritten, to save memory.
    X : array of shape (rows, columns)
        Initial values, zero off the support. Overwritten with the result.
    support : array of bool, of shape (rows, columns)
        Where `X` may be nonzero.
    n_steps : int
        Number of steps.

    Returns
    -------
    array of shape (rows, columns)
        `X`, zero off the support.
    """
    matmul = backend.namespace(X).matmul
    residual = backend.zeroed(residual, support)
    return conjugate_gradients(
        lambda D: backend.zeroed(matmul(gram, D), support), residual, X, n_steps
    )


def conjugate_gradients(
    image: Callable[[Array], Array],
    residual: Array,
    X: Array,
    n_steps: int,
    *,
    precondition: Callable[[Array], Array] | None = None,
) -> Array:
    """Take conjugate gradient steps towards the minimum of a quadratic function of `X`.

    Every step lowers the function.

    Parameters
    ----------
    image : callable
        The linear part of half the gradient: symmetric, positive semidefinite, and zero where `X`
        is fixed, unless `precondition` is zero there. Its result is overwritten.
    residual : array
        Minus half the gradient at `X`. Overwritten, to save memory.
    X : array
        Initial value. Overwritten.
    n_steps : int
        Number of steps.
    precondition : callable, optional
        Approximate inverse of `image` where `X` may change, and zero elsewhere.

    Returns
    -------
    array
        `X`.
    """
    xp = backend.namespace(X)
    direction = precondition(residual) if precondition else xp.asarray(residual, copy=True)
    unread, negligible = backend.inner(residual, direction), None
    for _ in range(n_steps):
        step = image(direction)
        energy, curvature = backend.numbers(unread, backend.inner(direction, step))
        if negligible is None:
            negligible = energy * float(xp.finfo(X.dtype).eps) ** 2
        if energy <= negligible or curvature <= 0.0:  # converged
            break
        step *= energy / curvature
        residual -= step
        del step  # saves memory: it is as large as X
        X += (energy / curvature) * direction
        scaled = precondition(residual) if precondition else residual
        unread = backend.inner(residual, scaled)
        direction *= unread / energy
        direction += scaled
        del scaled
    return X
