"""Butterfly factorization: approximation by products of Kronecker-sparse factors.

Blocks of the same factor are processed together in arrays of shape (a, γ, d, b, columns): the
column digits before the factor, its column digit, the row digits after it, its rows, and the
remaining columns.
"""

from __future__ import annotations

import functools
from typing import Any

from matfact import backend
from matfact.backend import Array
from matfact.kernels import dyadic
from matfact.solvers._callback import Callback
from matfact.solvers.chains import Chain
from matfact.solvers.leading import adjoint, conj, leading_range, orthonormal


def butterfly(
    W: Array, chain: Chain, *, max_iter: int = 10, tol: float = 1e-3, callback: Callback
) -> tuple[list[Array], int]:
    """Approximate `W` by a product of Kronecker-sparse factors.

    Hierarchical identification (Zheng et al., 2023) peels off the factors from the left; each
    consists of the leading singular vectors of all blocks of its cut. Their columns are
    orthonormal, so the errors of the cuts add up: the squared error is ``‖W‖² − ‖last factor‖²``,
    at most L − 1 times the optimum, as for tensor trains (Oseledets, 2011). Sweeps of alternating
    least squares then reduce it. The best factor l, given orthonormal factors before it and any
    factors after it, takes one product with the factors after it and is orthonormalized on the way.
    Residuals shrink geometrically along the chain, so the total cost is a few passes over `W`.

    Parameters
    ----------
    W : array of shape ``chain.shape``
        Finite matrix, real or complex.
    chain : Chain
        Supports of the factors.
    max_iter : int, default=10
        Maximum number of sweeps. Full accuracy needs at least one.
    tol : float, default=1e-3
        Stop when a sweep reduces the squared error by less than this fraction.
    callback : Callback
        Called with 1 after the identification, and after each sweep.

    Returns
    -------
    values : list of array of shape (a, d, b, c)
        Values of the factors.
    n_iter : int
        Number of sweeps.

    References
    ----------
    - L. Zheng, E. Riccietti, R. Gribonval, "Efficient identification of butterfly sparse
      matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023.
    - I. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33(5), 2011.
    """
    energy = backend.norm(W) ** 2
    xp = backend.namespace(W)
    # Differences of energies below this are rounding.
    floor = 64 * xp.finfo(W.dtype).eps * energy
    W = backend.contiguous(W)
    identify, sweep, unpack = _passes(W, chain)
    bases, last = identify(W)
    error = max(0.0, energy - backend.norm(last) ** 2)
    callback(1, error)
    n_iter = 0
    while n_iter < max_iter and len(bases):
        bases, last = sweep(W, bases, last)
        n_iter += 1
        previous, error = error, max(0.0, energy - backend.norm(last) ** 2)
        callback(n_iter + 1, error)
        if previous - error <= max(tol * previous, floor):
            break
    return [*unpack(bases), last[:, None, :, :]], n_iter


def _passes(W: Array, chain: Chain) -> tuple[Any, Any, Any]:
    """Return the functions that identify factors, improve them, and convert them to values."""
    radices = {*chain.row_radices, *chain.column_radices}
    if backend.is_numpy(W) and radices == {2} and {*chain.ranks} == {1}:
        return dyadic.identify, dyadic.sweep, dyadic.unpack
    return (
        functools.partial(_identify, chain=chain),
        functools.partial(_sweep, chain=chain),
        lambda bases: [*map(_as_values, bases)],
    )


def _identify(W: Array, chain: Chain) -> tuple[list[Array], Array]:
    """Peel orthonormal factors off `W`; return them, by blocks, and the remainder."""
    bases, rest = [], W[None, :, :]
    for rows, radix, rank in _cuts(chain):
        blocks = _blocks(rest, rows, radix)
        bases.append(leading_range(blocks, rank))
        rest = _remainder(bases[-1], blocks)
    return bases, rest


def _sweep(W: Array, bases: list[Array], last: Array, chain: Chain) -> tuple[list[Array], Array]:
    """Replace each factor by the best one given the others."""
    xp = backend.namespace(W)
    improved, rest = [], W[None, :, :]
    tails = _tails([*map(conj, bases)], conj(last))  # conjugate while they are small
    for (rows, radix, rank), tail in zip(_cuts(chain), tails, strict=True):
        blocks = _blocks(rest, rows, radix)
        # Least squares divides by the Gram matrix of the tail, which does not change the range.
        weights = xp.matrix_transpose(_split_rank(tail, radix, rank))
        improved.append(orthonormal(xp.matmul(blocks, weights)))
        rest = _remainder(improved[-1], blocks)
    return improved, rest


def _cuts(chain: Chain) -> list[tuple[int, int, int]]:
    """Return block rows, column radix and rank of every factor but the last."""
    patterns = chain.patterns[:-1]
    return [(b, g, c // g) for (_, b, c, _), g in zip(patterns, chain.column_radices, strict=False)]


def _tails(bases: list[Array], last: Array) -> list[Array]:
    """Return, for each factor but the last, the product of the factors after it."""
    xp = backend.namespace(last)
    tails = [last]
    for basis in reversed(bases[1:]):
        a, radix, d, rows, rank = basis.shape
        product = xp.matmul(basis, _split_rank(tails[-1], radix, rank))
        product = xp.permute_dims(product, (0, 3, 2, 1, 4))
        tails.append(xp.reshape(product, (a, rows * d, -1)))
    return tails[::-1]


def _blocks(rest: Array, rows: int, radix: int) -> Array:
    """Cut (a, rows·d, radix·columns) into blocks (a, radix, d, rows, columns)."""
    xp = backend.namespace(rest)
    a, height, width = rest.shape
    cut = xp.reshape(rest, (a, rows, height // rows, radix, width // radix))
    return xp.permute_dims(cut, (0, 3, 2, 1, 4))


def _split_rank(rest: Array, radix: int, rank: int) -> Array:
    """View (a·radix, rank·d, columns) as blocks (a, radix, d, rank, columns)."""
    xp = backend.namespace(rest)
    split = xp.reshape(rest, (-1, radix, rank, rest.shape[1] // rank, rest.shape[2]))
    return xp.permute_dims(split, (0, 1, 3, 2, 4))


def _remainder(basis: Array, blocks: Array) -> Array:
    """Return the coefficients of `blocks` in `basis`, the target of the later factors."""
    xp = backend.namespace(blocks)
    coefficients = xp.matmul(adjoint(basis), blocks)
    a, radix, d, rank, columns = coefficients.shape
    coefficients = xp.permute_dims(coefficients, (0, 1, 3, 2, 4))
    return xp.reshape(coefficients, (a * radix, rank * d, columns))


def _as_values(basis: Array) -> Array:
    """Turn blocks (a, radix, d, b, rank) into values (a, d, b, radix·rank)."""
    xp = backend.namespace(basis)
    a, radix, d, rows, rank = basis.shape
    return xp.reshape(xp.permute_dims(basis, (0, 2, 3, 1, 4)), (a, d, rows, radix * rank))
