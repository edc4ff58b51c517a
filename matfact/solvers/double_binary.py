"""Double binary factorization: two matrices of signs between diagonal scales."""

from __future__ import annotations

import dataclasses

import numpy as np

from matfact import backend, kernels
from matfact.backend import Array
from matfact.solvers._callback import Callback
from matfact.solvers.layerwise import in_metric, squared_error

#: Penalty of the first ADMM step of a sweep, in the first and the last sweep; geometric between.
EXPLORE = (0.1, 1.0)
#: Penalty of the second step.
SETTLE = 1.0
#: Share of the sweeps after which penalties stay as they end.
ANNEALED = 0.97
#: Share of the diagonal added to Gram matrices. Ridge regression shrinks what is uncertain, and
#: its signs are chosen late: more of it than `matfact.solvers.admm` has finds better ones.
DAMPING = 0.1
#: Rounds of single flips and of scales that end a fit, and passes over the signs in each.
ROUNDS, PASSES = 4, 4
#: Share of the diagonal added before scales are solved for.
RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class SignState:
    """Where ADMM stands: one array `V` whose projection is the solution and whose rest the dual.

    The solution is ``sign(V) · u vᵀ``, entry by entry; `v` starts the next projection.
    """

    V: Array
    u: Array
    v: Array

    @property
    def solution(self) -> Array:
        """The signs of `V` with magnitudes of rank one."""
        return signs(self.V) * self.u[:, None] * self.v[None, :]


@dataclasses.dataclass
class BinaryProduct:
    """``diag(a) S diag(m) T diag(b)`` with signs `S`, of shape (rows, k), and `T`, (k, columns)."""

    a: Array
    S: Array
    m: Array
    T: Array
    b: Array

    @property
    def left(self) -> Array:
        """``diag(a) S diag(m)``."""
        return self.a[:, None] * self.S * self.m[None, :]

    @property
    def right(self) -> Array:
        """``T diag(b)``."""
        return self.T * self.b[None, :]

    def toarray(self) -> Array:
        """Return the product."""
        return backend.namespace(self.S).matmul(self.left, self.right)


def signs(array: Array) -> Array:
    """Return 1 where an entry is not negative, and −1 elsewhere."""
    xp = backend.namespace(array)
    return xp.where(array < 0, -xp.ones_like(array), xp.ones_like(array))


def double_binary(
    W: Array,
    n_terms: int,
    *,
    metric: Array | None = None,
    max_iter: int = 200,
    seed: int = 0,
    callback: Callback | None = None,
) -> tuple[BinaryProduct, int]:
    """Approximate `W` by two matrices of signs between diagonal scales.

    Source: Boža & Macko 2025, "Addition is almost all you need: compressing neural networks with
    double binary factorization": sparse regressions by ADMM as in double sparse factorization,
    with a projection on signs times magnitudes of rank one. What differs is the schedule, a
    start from singular vectors that are turned at random, and what follows: signs are flipped one
    by one as long as that helps, in turn with least squares for the scales.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite real matrix.
    n_terms : int
        `k`, columns of the first and rows of the second matrix of signs.
    metric : array of shape (columns, columns), optional
        Positive definite matrix `H` of ``tr (W − Ŵ) H (W − Ŵ)ᵀ``, which flips and scales lower;
        by default the identity.
    max_iter : int
        Number of sweeps. The schedule stretches over them: more sweeps find better signs.
    seed : int
        Seed of the rotation.
    callback : callable, optional
        Called with the number of every sweep and the objective ``‖W − A B‖_F²`` after it.

    Returns
    -------
    product : BinaryProduct
        The signs and the scales.
    n_iter : int
        Sweeps made.
    """
    xp = backend.namespace(W)
    W_transposed = backend.contiguous(xp.matrix_transpose(W))
    # The first factor is kept transposed, so that either is the unknown of Mᵀ X ≈ target.
    A, B = (_projected(V, None) for V in _start(W, n_terms, seed))
    energy, sweep = backend.norm(W) ** 2, 0
    solution = B.solution
    gram = _gram(solution)
    for sweep in range(1, max_iter + 1):
        penalties = _penalties(sweep, max_iter)
        A = sign_regression(gram, xp.matmul(solution, W_transposed), A, penalties)
        solution = A.solution
        cross, gram_left = xp.matmul(solution, W), _gram(solution)
        B = sign_regression(gram_left, cross, B, penalties)
        solution = B.solution
        gram = _gram(solution)
        if callback is not None:
            explained, made = backend.numbers(
                backend.inner(cross, solution), backend.inner(gram_left, gram)
            )
            callback(sweep, max(0.0, energy - 2 * explained + made))
        scale = _imbalance(A, B)
        A, B = _scaled(A, scale), _scaled(B, 1 / scale)
        solution, gram = solution / scale[:, None], gram / scale[:, None] / scale[None, :]
    transpose = xp.matrix_transpose
    product = BinaryProduct(A.v, signs(transpose(A.V)), A.u * B.u, signs(B.V), B.v)
    refine(product, W, metric)
    return product, sweep


def _penalties(sweep: int, max_iter: int) -> tuple[float, float]:
    time = min(1.0, sweep / (ANNEALED * max_iter))
    return EXPLORE[0] * (EXPLORE[1] / EXPLORE[0]) ** time, SETTLE


def _start(W: Array, n_terms: int, seed: int) -> tuple[Array, Array]:
    """Return factors of `W`, or of its best approximation, whose entries are all about alike."""
    xp = backend.namespace(W)
    U, s, Vh = xp.linalg.svd(W, full_matrices=False)
    rank = min(n_terms, s.shape[0])
    root = xp.sqrt(s[:rank])[:, None]
    square = np.random.default_rng(seed).standard_normal((n_terms, n_terms))
    rotation = backend.like(np.linalg.qr(square)[0][:, :rank], W, dtype=W.dtype)
    halves = root * xp.matrix_transpose(U[:, :rank]), root * Vh[:rank, :]
    return xp.matmul(rotation, halves[0]), xp.matmul(rotation, halves[1])


def sign_regression(
    gram: Array, cross: Array, state: SignState, penalties: tuple[float, ...]
) -> SignState:
    """Lower ``‖Mᵀ X − W‖_F²`` over `X` of signs times magnitudes of rank one, by ADMM.

    Parameters
    ----------
    gram : array of shape (k, k)
        ``M Mᵀ``.
    cross : array of shape (k, columns)
        ``M W``.
    state : SignState
        Where to start. On NumPy it is overwritten.
    penalties : tuple of float
        Penalty of each step, relative to the diagonal of `gram`.
    """
    xp = backend.namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    diagonal = xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal))
    for penalty in penalties:
        rhs = kernels.sign_target(cross, state.V, state.u, state.v, penalty * diagonal)
        rhs = backend.spd_solve(backend.add_diagonal(gram, (penalty + DAMPING) * diagonal), rhs)
        state = _projected(kernels.absorb_signs(rhs, state.V, state.u, state.v), state.v)
    return state


def _projected(V: Array, v: Array | None) -> SignState:
    """Return the state of `V`: the magnitudes of rank one by a step from those of before."""
    xp = backend.namespace(V)
    magnitudes = xp.abs(V)
    u = xp.mean(magnitudes, axis=1) if v is None else xp.matmul(magnitudes, v)
    u = backend.normalized(u)
    return SignState(V, u, xp.matmul(u, magnitudes))


def _imbalance(A: SignState, B: SignState) -> Array:
    """Return what gives the two magnitudes of each term, rows of both states, equal norms."""
    xp = backend.namespace(A.V)
    norms = [state.u * xp.linalg.vector_norm(state.v) for state in (A, B)]
    used = (norms[0] > 0) & (norms[1] > 0)
    ones = xp.ones_like(norms[0])
    return xp.sqrt(xp.where(used, norms[1], ones) / xp.where(used, norms[0], ones))


def _scaled(state: SignState, scale: Array) -> SignState:
    return SignState(state.V * scale[:, None], state.u * scale, state.v)


def _gram(M: Array) -> Array:
    xp = backend.namespace(M)
    return xp.matmul(M, xp.matrix_transpose(M))


def refine(product: BinaryProduct, W: Array, metric: Array | None = None) -> None:
    """Flip signs and fit scales of `product`, in place, as long as that lowers the error.

    Parameters
    ----------
    product : BinaryProduct
        Overwritten.
    W : array of shape (rows, columns)
        The matrix it approximates.
    metric : array of shape (columns, columns), optional
        As for `double_binary`.
    """
    best, least = dataclasses.replace(product), np.inf
    for _ in range(ROUNDS):
        fit_scales(product, W, metric)
        error = squared_error(W - product.toarray(), metric)
        if not error < least * (1 - 1e-4):
            break
        best, least = dataclasses.replace(product), error
        _flip_left(product, W, metric)
        _flip_right(product, W, metric)
    else:
        fit_scales(product, W, metric)
        if squared_error(W - product.toarray(), metric) < least:
            return
    vars(product).update(vars(best))


def _flip_left(product: BinaryProduct, W: Array, metric: Array | None) -> None:
    """Flip signs of `S` while that lowers the error: rows do not depend on each other."""
    xp = backend.namespace(W)
    right = product.m[:, None] * product.right
    moved = xp.matrix_transpose(in_metric(right, metric))
    gram, a = xp.matmul(right, moved), product.a
    cross = xp.matmul(W, moved) / xp.where(a != 0, a, xp.ones_like(a))[:, None]
    product.S = _flipped(product.S, xp.matmul(product.S, gram) - cross, gram)


def _flip_right(product: BinaryProduct, W: Array, metric: Array | None) -> None:
    """Flip signs of `T`, whose columns a metric ties together."""
    xp = backend.namespace(W)
    transpose = xp.matrix_transpose
    left, b = product.left, product.b
    gram = xp.matmul(transpose(left), left)
    if metric is None:
        cross = xp.matmul(transpose(W), left) / xp.where(b != 0, b, xp.ones_like(b))[:, None]
        S = transpose(product.T)
        product.T = transpose(_flipped(S, xp.matmul(S, gram) - cross, gram))
        return
    F = product.right
    gradient = in_metric(xp.matmul(transpose(left), xp.matmul(left, F) - W), metric)
    F, gradient, gram, H = (_own(array) for array in (F, gradient, gram, metric))
    kernels.flip_in_metric(F, gradient, gram, H, PASSES)
    product.T = signs(backend.like(F, W)) * signs(b)[None, :]


def _flipped(S: Array, gradient: Array, gram: Array) -> Array:
    own = [_own(array) for array in (S, gradient, gram)]
    kernels.flip_rows(*own, PASSES)
    return backend.like(own[0], S)


def _own(array: Array) -> np.ndarray:
    """Return a copy on the host, where signs are flipped one after the other."""
    return np.array(backend.to_numpy(array), order="C")


def fit_scales(product: BinaryProduct, W: Array, metric: Array | None = None) -> None:
    """Fit the scales of `product` by least squares, those on either side and between in turn."""
    xp = backend.namespace(W)
    transpose = xp.matrix_transpose
    wanted = in_metric(W, metric)
    fit_outputs(product, W, metric)
    left, right = product.a[:, None] * product.S, product.right
    moved = in_metric(right, metric)
    gram = xp.matmul(transpose(left), left) * xp.matmul(moved, transpose(right))
    product.m = _solved(gram, xp.sum(xp.matmul(transpose(left), wanted) * right, axis=1))
    P = xp.matmul(product.left, product.T)
    target = xp.sum(P * wanted, axis=0)
    if metric is None:
        product.b = _ratio(target, xp.sum(P * P, axis=0), product.b)
    else:
        product.b = _solved(xp.matmul(transpose(P), P) * metric, target)
    fit_outputs(product, W, metric)


def fit_outputs(product: BinaryProduct, W: Array, metric: Array | None = None) -> None:
    """Fit the scales of the outputs of `product` by least squares."""
    xp, wanted = backend.namespace(W), in_metric(W, metric)
    P = xp.matmul(product.S * product.m[None, :], product.right)
    product.a = _ratio(
        xp.sum(P * wanted, axis=1), xp.sum(P * in_metric(P, metric), axis=1), product.a
    )


def _ratio(numerator: Array, denominator: Array, otherwise: Array) -> Array:
    xp = backend.namespace(numerator)
    used = denominator > 0
    return xp.where(used, numerator / xp.where(used, denominator, 1 + 0 * denominator), otherwise)


def _solved(gram: Array, target: Array) -> Array:
    """Return the solution of symmetric equations, in double precision where there is one."""
    xp = backend.namespace(gram)
    gram, target = backend.wide(gram), backend.wide(target)
    mean = float(xp.mean(xp.linalg.diagonal(gram)))
    ridge = RIDGE * xp.linalg.diagonal(gram) + RIDGE * (mean if mean > 0 else 1.0)
    solution = backend.spd_solve(
        backend.add_diagonal(gram, ridge), backend.contiguous(target[:, None])
    )
    return solution[:, 0]
