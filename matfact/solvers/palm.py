"""Proximal alternating linearized minimization (PALM) of ``‖W − S_1 S_2 … S_Q‖_F²``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from matfact import backend
from matfact.backend import Array
from matfact.constraints import Constraint, Support
from matfact.solvers._callback import Callback

#: Initial step as a multiple of 1 ÷ curvature; beyond 2 a gradient step diverges.
RELAXATION = 1.8
#: Shares of the iterations after which the step begins to shrink, and has shrunk to 1.
HELD, ANNEALED = 0.7, 0.95
#: Maximum ratio of the objective after and before a sweep once the right supports are found.
SETTLED = 0.5
#: Relative error, in units of rounding, that counts as exact.
NEGLIGIBLE = 32
#: Powers of two by which a factor's norm may differ from the mean before rescaling.
DRIFT = 10
#: Relative change of a product allowed by rounding.
ROUNDING = 1e-4
#: The estimated curvature is divided by this after an accepted step, multiplied after a rejected
#: one.
SHRINK, GROW = 1.25, 1.3


def palm4msa(
    W: Array,
    factors: Sequence[Array],
    constraints: Sequence[Constraint],
    *,
    max_iter: int = 100,
    tol: float = 1e-6,
    relaxation: float = RELAXATION,
    backward: bool = False,
    callback: Callback | None = None,
) -> tuple[list[Array], float, int]:
    """Approximate `W` by a product of factors, each in its constraint set.

    Source: Le Magoarou & Gribonval (2016), Fig. 2: a block proximal gradient method on one factor
    after the other. Three things differ. The step size follows the curvature along the step instead
    of the product of spectral norms, which only bounds it. Where the constraint allows it, a
    diagonal preconditioner normalizes the columns left and the rows right of a factor. The first
    steps are longer than descent permits, so that supports keep changing; once supports settle and
    the objective falls fast, and late in any case, steps are short enough to descend. The best
    iterate is returned, which is never worse than the start.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix.
    factors : sequence of array
        Initial factors with matching inner dimensions; they are first projected and scaled to fit.
    constraints : sequence of Constraint
        One constraint per factor.
    max_iter : int
        Maximum number of sweeps over the factors.
    tol : float
        Stop when a sweep of descending steps reduces the objective by less than this fraction.
    relaxation : float
        Initial step size relative to the largest that is sure to descend, in [1, 2].
    backward : bool
        Whether sweeps go from the last factor to the first.
    callback : callable, optional
        Called with the number of every sweep and the objective ``‖W − S_1 … S_Q‖_F²``.

    Returns
    -------
    factors : list of array
        The best factors found.
    scale : float
        Scalar to multiply the product by; 1 if all constraints allow scaling.
    n_iter : int
        Number of sweeps.

    References
    ----------
    - L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices
      and applications", IEEE J. Sel. Topics Signal Process. 10(4), 2016.
    """
    factors = [c.project(f) for c, f in zip(constraints, factors, strict=True)]
    product = functools.reduce(backend.namespace(W).matmul, factors)
    curvatures = [1.0] * len(factors)
    is_scaled = not all(constraint.is_cone for constraint in constraints)
    (total,) = backend.numbers(_energy(W))
    scale = _best_scale(total, *backend.numbers(_energy(product), _real_inner(product, W)))
    if not is_scaled:
        power = 2.0 ** round(math.log2(scale))  # exact; the steps find the rest
        factors[0], product, scale = power * factors[0], power * product, 1.0
    (objective,) = backend.numbers(_energy(W - scale * product))
    best, best_scale, best_objective = list(factors), scale, objective
    negligible = _negligible(W, total)
    if len(factors) == 1 or all(isinstance(constraint, Support) for constraint in constraints):
        relaxation = 1.0  # nothing to explore
    supports, is_settled = [factor != 0 for factor in factors], False

    def measured(factors: list[Array], product: Array) -> list[Array]:
        match = _real_inner(product, W) if is_scaled else _energy(W - product)
        return [_energy(product), match, *map(_energy, factors)]

    for iteration in range(1, max_iter + 1):
        previous = objective
        stretch = 1.0 if is_settled else _stretch((iteration - 1) / max_iter, relaxation)
        product, read = _sweep(
            W / scale, factors, product, constraints, curvatures, stretch, backward, measured
        )
        energies = read[2:]
        is_trusted = not _cancels(energies, read[0], W)
        if not is_trusted:
            product = functools.reduce(backend.namespace(W).matmul, factors)
            read = backend.numbers(*measured(factors, product))
        if is_scaled:
            scale = _best_scale(total, *read[:2])
            (objective,) = backend.numbers(_energy(W - scale * product))
        else:
            factors = _near_in_norm(factors, energies)
            objective = read[1]
        last, supports = supports, [factor != 0 for factor in factors]
        is_settled = objective <= SETTLED * previous and _are_equal(last, supports)
        if callback is not None:
            callback(iteration, objective)
        # Large entries that cancel no longer do so once factors are scaled, stored or rounded.
        if objective < best_objective and (is_trusted or not _paths_cancel(factors, product)):
            best, best_scale, best_objective = list(factors), scale, objective
        is_stalled = stretch == 1.0 and previous - objective <= tol * objective
        if is_stalled or objective <= negligible:
            break
    return _balanced(best, constraints), best_scale, iteration


def _balanced(factors: list[Array], constraints: Sequence[Constraint]) -> list[Array]:
    """Return factors of the same product with equal norms of adjacent columns and rows.

    Entries that meet only zeros in the neighbour become zero. Constraints must allow scaling.
    """
    factors = list(factors)
    for i, pair in enumerate(itertools.pairwise(constraints)):
        if all(constraint.is_scale_free for constraint in pair):
            left, right = factors[i : i + 2]
            xp = backend.namespace(left)
            columns = xp.sqrt(xp.linalg.vector_norm(left, axis=0))
            rows = xp.sqrt(xp.linalg.vector_norm(right, axis=1))
            is_used = (columns > 0) & (rows > 0)
            one, zero = xp.ones_like(rows), xp.zeros_like(rows)
            ratio = xp.where(is_used, rows, zero) / xp.where(is_used, columns, one)
            inverse = xp.where(is_used, columns, zero) / xp.where(is_used, rows, one)
            factors[i : i + 2] = left * ratio, inverse[:, None] * right
    return factors


def _near_in_norm(factors: list[Array], energies: list[float]) -> list[Array]:
    """Rescale factors by powers of two, which is exact, if long steps unbalanced them."""
    if min(energies) == 0.0:
        return factors
    logs = [0.5 * math.log2(energy) for energy in energies]
    shifts = [round(sum(logs) / len(logs) - log) for log in logs]
    if max(map(abs, shifts)) < DRIFT:
        return factors
    shifts[0] -= sum(shifts)
    return [2.0**shift * factor for shift, factor in zip(shifts, factors, strict=True)]


def _cancels(energies: list[float], made: float, W: Array) -> bool:
    """Whether entries are too large to trust the incrementally updated product."""
    eps = float(backend.namespace(W).finfo(W.dtype).eps)
    return eps * math.prod(energies) ** 0.5 > ROUNDING * made**0.5


def _paths_cancel(factors: list[Array], product: Array) -> bool:
    """Whether rounding the factors' entries may change their product, at any scaling."""
    xp = backend.namespace(product)
    # Use entries times their counterparts, not norms: a large column may meet a row of zeros.
    paths = functools.reduce(xp.matmul, [xp.abs(factor) for factor in factors])
    eps = float(xp.finfo(product.dtype).eps)
    along, made = backend.numbers(_energy(paths), _energy(product))
    return eps * along**0.5 > ROUNDING * made**0.5


def identity_start(
    W: Array, constraints: Sequence[Constraint], *, backward: bool = False
) -> tuple[list[Array], bool]:
    """Return identities and the projection of `W` as initial factors, and `backward`.

    All factors but the one at the longer side are square with the shorter side. `backward` makes
    `palm4msa` begin with an identity, since it would not move from the projection. For a
    square `W` it is as given.
    """
    xp = backend.namespace(W)
    rows, columns = W.shape
    backward = rows > columns or (rows == columns and backward)
    eye = xp.eye(min(rows, columns), dtype=W.dtype, device=backend.device(W))
    identities = [eye] * (len(constraints) - 1)
    if backward:
        return [constraints[0].project(W), *identities], True
    return [*identities, constraints[-1].project(W)], False


def is_exact(W: Array, factors: Sequence[Array]) -> bool:
    """Whether the product of `factors` equals `W` up to rounding."""
    product = functools.reduce(backend.namespace(W).matmul, factors)
    lost, total = backend.numbers(_energy(W - product), _energy(W))
    return lost <= _negligible(W, total)


def _negligible(W: Array, total: float) -> float:
    """Return the objective below which a product counts as exact."""
    return total * (NEGLIGIBLE * float(backend.namespace(W).finfo(W.dtype).eps)) ** 2


def _stretch(progress: float, relaxation: float) -> float:
    """Return the step size factor after a share `progress` of the iterations."""
    left = min(1.0, max(0.0, (ANNEALED - progress) / (ANNEALED - HELD)))
    return 1.0 + (relaxation - 1.0) * left


def _sweep(
    W: Array,
    factors: list[Array],
    product: Array,
    constraints: Sequence[Constraint],
    curvatures: list[float],
    stretch: float,
    backward: bool,
    measured: Callable[[list[Array], Array], list[Array]],
) -> tuple[Array, list[float]]:
    """Update every factor once, in place; return the updated `product` and what is `measured`.

    Whether a step is short enough is known once numbers are read. Where the host waits for them,
    all steps are taken before it does, and those after one that was too long are taken again.
    """

    def join(near: Array | None, far: Array | None) -> Array | None:
        return _times(far, near) if backward else _times(near, far)

    order = range(len(factors))[:: -1 if backward else 1]
    ahead: list[Array | None] = [None]
    for j in reversed(order[1:]):
        ahead.append(join(factors[j], ahead[-1]))
    done, place, step, eager = None, 0, None, not backend.is_on_host(W)
    while place < len(order):
        taken: list[tuple[_Step, Array, Array | None]] = []
        unread, found = [], list(factors)
        for i in range(place, len(order) if eager else place + 1):
            j, far = order[i], ahead[len(order) - 1 - i]
            if step is None:
                sides = (far, done) if backward else (done, far)
                step = _Step(factors[j], constraints[j], sides, product - W)
            taken.append((step, product, done))
            found[j], change, *sizes = step.along(curvatures[j])
            unread += sizes
            product = product + change
            done = join(done, found[j]) if i + 1 < len(order) else None
            step = None
        read = backend.numbers(*unread, *(measured(found, product) if eager else []))
        for (tried, *before), met, size in zip(taken, read[::2], read[1::2], strict=False):
            j, size = order[place], stretch * size
            # The curvature along a step never exceeds the bound: rounding cannot trap the search.
            if not (curvatures[j] >= tried.bound or met <= curvatures[j] * size):
                curvatures[j] = min(tried.bound, curvatures[j] * GROW)
                step, (product, done) = tried, before
                break
            factors[j], place = found[j], place + 1
            curvatures[j] = max(curvatures[j] / SHRINK, met / size if size else 0.0)
    return product, read[len(unread) :] if eager else backend.numbers(*measured(factors, product))


class _Step:
    """A proximal gradient step on a factor between the products at its `sides`."""

    def __init__(
        self,
        factor: Array,
        constraint: Constraint,
        sides: tuple[Array | None, Array | None],
        residual: Array,
    ) -> None:
        self._constraint, self._sides = constraint, sides
        self._weights, self.bound = _weights(sides, constraint.is_scale_free)
        left, right = map(_adjoint, sides)
        self._gradient = _times(_times(left, residual), right) / self._weights
        self._start = factor * self._weights

    def along(self, curvature: float) -> tuple[Array, Array, Array, Array]:
        """Return the new factor, what it adds to the product, and the squared norms of both steps.

        The first is that of the product's step, the second that of the factor's.
        """
        (left, right), weights = self._sides, self._weights
        target = self._start - self._gradient / curvature
        if self._constraint.is_scale_free:
            new = self._constraint.project(target)
        else:
            new = weights * self._constraint.project(target / weights)
        step = new - self._start
        change = _times(left, _times(step / weights, right))
        return new / weights, change, _energy(change), _energy(step)


def _weights(sides: tuple[Array | None, Array | None], is_scale_free: bool) -> tuple[Array, float]:
    """Return the metric of a factor's entries, and the largest curvature in it."""
    weights, bound = 1.0, 1.0
    for array, axis in zip(sides, (0, 1), strict=True):
        if array is None:
            continue
        xp = backend.namespace(array)
        norms = xp.linalg.vector_norm(array, axis=axis, keepdims=True)
        if not is_scale_free:
            norms = xp.linalg.vector_norm(norms, keepdims=True) / array.shape[1 - axis] ** 0.5
        norms = xp.where(norms > 0, norms, xp.ones_like(norms))
        weights = weights * xp.matrix_transpose(norms)
        bound *= array.shape[1 - axis]
    return weights, float(bound)


def _best_scale(total: float, made: float, inner: float) -> float:
    """Return the positive scale of a product nearest to `W`.

    `total` and `made` are the squared norms of `W` and of the product, `inner` is their product.
    """
    if made == 0.0:
        return 1.0
    # A product that points away from W should be small, but not 0.
    return max(inner / made, 1e-3 * (total / made) ** 0.5) or 1.0


def _real_inner(product: Array, W: Array) -> Array:
    """Return the real inner product, not read yet."""
    xp = backend.namespace(W)
    return xp.real(xp.sum(xp.conj(product) * W))


def _times(left: Array | None, right: Array | None) -> Array | None:
    """Return the product of two matrices; None is the identity."""
    if left is None or right is None:
        return right if left is None else left
    return backend.namespace(left).matmul(left, right)


def _adjoint(array: Array | None) -> Array | None:
    if array is None:
        return None
    xp = backend.namespace(array)
    is_complex = xp.isdtype(array.dtype, "complex floating")
    return xp.matrix_transpose(xp.conj(array) if is_complex else array)


def _are_equal(first: list[Array], second: list[Array]) -> bool:
    xp = backend.namespace(*first)
    return all(backend.numbers(*(xp.all(a == b) for a, b in zip(first, second, strict=True))))


def _energy(array: Array) -> Array:
    """Return the squared Frobenius norm, not read yet."""
    xp = backend.namespace(array)
    flat = xp.reshape(array, (-1,))
    energy = xp.vecdot(flat, flat)
    return xp.real(energy) if xp.isdtype(array.dtype, "complex floating") else energy
