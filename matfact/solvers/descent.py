"""Joint descent on the values of all factors of a product."""

from __future__ import annotations

from collections.abc import Callable

from matfact import backend
from matfact.backend import Array
from matfact.operators import KroneckerSparseFactor
from matfact.solvers._callback import Callback
from matfact.solvers.leading import adjoint

#: Pairs of steps and gradient changes kept by the quasi-Newton method.
_MEMORY = 10
#: Halvings of a step after which only rounding is left.
_MAX_HALVINGS = 20


def descend(
    W: Array, values: list[Array], *, max_iter: int, tol: float, callback: Callback
) -> tuple[list[Array], int]:
    """Minimize ``‖W − F_1 ⋯ F_Q‖_F²`` over the values of Kronecker-sparse factors.

    Uses a limited-memory quasi-Newton method (Liu, Nocedal 1989) on all values at once. In products
    of several chains, or in a chain that is not a butterfly, a factor has no closed form given the
    others.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite matrix, real or complex, approximated by the leading rows and columns of the product.
    values : list of array of shape (a, d, b, c)
        Initial values of the factors.
    max_iter : int
        Maximum number of steps.
    tol : float
        Stop when ten steps reduce the squared error by less than this fraction.
    callback : Callback
        Called with 0 before the first step, and after each step.

    Returns
    -------
    values : list of array
        Values of the factors.
    n_iter : int
        Number of steps.
    """

    def objective(vector: Array) -> tuple[Array, Array]:
        loss, gradients = loss_and_gradient(W, _unpack(vector, values))
        return loss, _pack(gradients)

    xp = backend.namespace(W)
    eps = float(xp.finfo(W.dtype).eps)
    vector, n_iter = _pack(_balanced(values)), 0
    unread, gradient = objective(vector)
    (loss,) = backend.numbers(unread)
    losses: list[float] = [loss]
    memory: list[tuple[Array, Array]] = []
    callback(0, loss)
    floor = (eps * backend.norm(W)) ** 2 * len(values)
    while n_iter < max_iter and loss > floor:
        direction = _quasi_newton(gradient, memory)
        found = _line_search(objective, vector, loss, gradient, direction)
        if found is None:
            break
        new_vector, loss, new_gradient = found
        memory = [*memory, (new_vector - vector, new_gradient - gradient)][-_MEMORY:]
        vector, gradient = new_vector, new_gradient
        n_iter += 1
        losses.append(loss)
        callback(n_iter, loss)
        if n_iter >= 10 and losses[-11] - loss <= tol * losses[-11]:
            break
    return _unpack(vector, values), n_iter


def loss_and_gradient(W: Array, values: list[Array]) -> tuple[Array, list[Array]]:
    """Return ``‖W − F_1 ⋯ F_Q‖_F²`` of the leading block, not read yet, and half its gradients."""
    xp = backend.namespace(W)
    rows, columns = W.shape
    a, d, _, c = values[-1].shape
    tails = [xp.eye(a * c * d, columns, dtype=W.dtype, device=backend.device(W))]
    for v in reversed(values):
        tails.append(KroneckerSparseFactor(v).apply(tails[-1]))
    residual = tails.pop()[:rows, :] - W
    height = values[0].shape[0] * values[0].shape[1] * values[0].shape[2]
    missing = xp.zeros((height - rows, columns), dtype=W.dtype, device=backend.device(W))
    slope, gradients = xp.concat([residual, missing]), []
    for v in values:
        gradients.append(_on_support(slope, tails.pop(), v))
        slope = KroneckerSparseFactor(adjoint(v)).apply(slope)
    return backend.squared_norm(residual), gradients


def _on_support(slope: Array, tail: Array, v: Array) -> Array:
    """Return the entries of ``slope tailᴴ`` on the support of the factor with values `v`."""
    xp = backend.namespace(v)
    a, d, b, c = v.shape
    slope = xp.permute_dims(xp.reshape(slope, (a, b, d, -1)), (0, 2, 1, 3))
    tail = xp.permute_dims(xp.reshape(tail, (a, c, d, -1)), (0, 2, 1, 3))
    return xp.matmul(slope, adjoint(tail))


def _balanced(values: list[Array]) -> list[Array]:
    """Return factors of equal norms with the same product."""
    norms = [backend.norm(v) for v in values]
    if 0.0 in norms:
        return values
    mean = 1.0
    for norm in norms:
        mean *= norm ** (1 / len(norms))
    return [v * (mean / norm) for v, norm in zip(values, norms, strict=True)]


def _pack(values: list[Array]) -> Array:
    xp = backend.namespace(values[0])
    return xp.concat([xp.reshape(v, (-1,)) for v in values])


def _unpack(vector: Array, like: list[Array]) -> list[Array]:
    xp = backend.namespace(vector)
    values, start = [], 0
    for v in like:
        a, d, b, c = v.shape
        end = start + a * d * b * c
        values.append(xp.reshape(vector[start:end], v.shape))
        start = end
    return values


def _dot(x: Array, y: Array) -> Array:
    """Return the real inner product, a float in NumPy and elsewhere not read yet."""
    xp = backend.namespace(x)
    product = xp.vecdot(x, y)
    if backend.is_numpy(x):
        return complex(product).real
    return xp.real(product) if backend.is_complex(product) else product


def _quasi_newton(gradient: Array, memory: list[tuple[Array, Array]]) -> Array:
    """Return minus the gradient times the inverse Hessian approximated from `memory`."""
    direction, weights = -gradient, []
    for step, change in reversed(memory):
        weight = _dot(step, direction) / _dot(step, change)
        direction = direction - weight * change
        weights.append(weight)
    if not memory:
        return direction
    step, change = memory[-1]
    direction = direction * (_dot(step, change) / _dot(change, change))
    for (step, change), weight in zip(memory, reversed(weights), strict=True):
        direction = direction + (weight - _dot(change, direction) / _dot(step, change)) * step
    return direction


def _line_search(
    objective: Callable[[Array], tuple[Array, Array]],
    vector: Array,
    loss: float,
    gradient: Array,
    direction: Array,
) -> tuple[Array, float, Array] | None:
    """Return a point that satisfies the weak Wolfe conditions, its loss and its gradient.

    Return None if no step descends.
    """
    unread_slope = 2 * _dot(gradient, direction)
    low, high, step = 0.0, None, 1.0
    for _ in range(_MAX_HALVINGS):
        candidate = vector + step * direction
        unread, new_gradient = objective(candidate)
        slope, new_loss, new_slope = backend.numbers(
            unread_slope, unread, 2 * _dot(new_gradient, direction)
        )
        if slope >= 0.0:
            return None
        if not new_loss <= loss + 1e-4 * step * slope:
            high = step
        elif new_slope < 0.9 * slope:
            low = step
        else:
            return candidate, new_loss, new_gradient
        step = 2 * step if high is None else (low + high) / 2
    return None
