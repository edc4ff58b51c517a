"""Chains of Kronecker-sparse supports, the shapes of butterfly and Monarch products."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import scipy.fft

Pattern = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Chain of supports ``I_a ⊗ 1_{b×c} ⊗ I_d``; the product has blocks of low rank.

    Rows are numbered by digits in the radices ``β_1 … β_L`` and columns by digits in
    ``γ_1 … γ_L``, most significant digit first. A cut after factor l divides the product into
    blocks of rank at most ``r_l``, indexed by the last L − l row digits and the first l column
    digits. Factor l has (with ``r_0 = r_L = 1``)

        a = γ_1 ⋯ γ_{l-1},   b = r_{l-1} β_l,   c = r_l γ_l,   d = β_{l+1} ⋯ β_L.

    Source: L. Zheng, E. Riccietti, R. Gribonval, "Efficient identification of butterfly sparse
    matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023, extended to ranks above one.

    Parameters
    ----------
    row_radices, column_radices : tuple of int
        ``β`` and ``γ``, one entry per factor.
    ranks : tuple of int
        ``r_1 … r_{L-1}``.
    """

    row_radices: tuple[int, ...]
    column_radices: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return (math.prod(self.row_radices), math.prod(self.column_radices))

    @property
    def patterns(self) -> list[Pattern]:
        """The (a, b, c, d) of each factor."""
        beta, gamma, r = self.row_radices, self.column_radices, (1, *self.ranks, 1)
        return [
            (math.prod(gamma[:i]), r[i] * beta[i], r[i + 1] * gamma[i], math.prod(beta[i + 1 :]))
            for i in range(len(beta))
        ]

    @property
    def nnz(self) -> int:
        """Stored values of all factors."""
        return sum(math.prod(pattern) for pattern in self.patterns)

    @property
    def rank_limits(self) -> tuple[int, ...]:
        """Largest useful ranks: the smaller sides of the blocks."""
        rows = accumulate(self.row_radices[:-1], int.__mul__)
        columns = accumulate(reversed(self.column_radices[1:]), int.__mul__)
        return tuple(map(min, rows, reversed(list(columns))))

    def with_rank(self, rank: int) -> Chain:
        """Return the chain with ranks `rank`, each capped at its limit."""
        ranks = tuple(min(rank, limit) for limit in self.rank_limits)
        return dataclasses.replace(self, ranks=ranks)

    def within(self, budget: int) -> Chain | None:
        """Return the chain of largest rank that stores at most `budget` values, if any."""
        low, high = 0, max(self.rank_limits, default=1)
        while low < high:  # ranks of at most `low` fit, those above `high` do not
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(middle, budget) else (low, middle - 1)
        return self.with_rank(low) if low else None

    def _fits(self, rank: int, budget: int) -> bool:
        return self.with_rank(rank).nnz <= budget

    @classmethod
    def from_patterns(cls, patterns: Sequence[Pattern]) -> Chain:
        """Return the chain of a list of patterns (a, b, c, d)."""
        a, b, c, d = zip(*patterns, strict=True)
        beta = (b[0], *(before // after for before, after in pairwise(d)))
        gamma = (*(after // before for before, after in pairwise(a)), c[-1])
        ranks = tuple(width // max(g, 1) for width, g in zip(c, gamma, strict=True))
        chain = cls(beta, gamma, ranks[:-1])
        limited = all(map(int.__le__, chain.ranks, chain.rank_limits))
        if chain.patterns != [tuple(pattern) for pattern in patterns] or not limited:
            raise ValueError(
                "chain must list patterns (a, b, c, d) that start with a=1, end with d=1 and fit "
                "one another (each a divides the next, each d is a multiple of the next, a·c·d of "
                f"each is a·b·d of the next) with no rank to spare, got {list(patterns)}."
            )
        return chain


def dense_chain(shape: tuple[int, int]) -> Chain:
    """Return the chain of a single dense factor."""
    return Chain(shape[:1], shape[1:], ())


def dyadic_chain(shape: tuple[int, int]) -> Chain:
    """Return the rank-one chain with the maximum number of factors for `shape`.

    Radices are 2 if the sides are powers of two. Sides with a prime factor above 5 are padded to
    the next length without one.
    """
    return grouped_chain(shape, max(shape))


@functools.lru_cache
def grouped_chain(shape: tuple[int, int], n_factors: int) -> Chain:
    """Return the rank-one chain of up to `n_factors` factors for `shape`."""
    primes = [prime_factors(scipy.fft.next_fast_len(n, real=True)) for n in shape]
    n_factors = min(n_factors, *map(len, primes))
    if n_factors <= 1:
        return dense_chain(shape)
    beta, gamma = (_group(factors, n_factors) for factors in primes)
    chain = Chain(beta, gamma, (1,) * (n_factors - 1))
    # Padding can cost more than it saves for tiny matrices.
    return chain if chain.nnz <= math.prod(shape) else dense_chain(shape)


def two_factor_chain(shape: tuple[int, int], n_blocks: tuple[int, int]) -> Chain:
    """Return the rank-one chain of two factors with the given numbers of blocks."""
    (rows, columns), (left, right) = shape, n_blocks
    return Chain((math.ceil(rows / left), left), (right, math.ceil(columns / right)), (1,))


def square_root_chain(shape: tuple[int, int]) -> Chain:
    """Return the rank-one chain of two factors with about as many blocks as rows per block."""
    rows, columns = (_near_divisor(n, math.sqrt(n)) for n in shape)
    return two_factor_chain(shape, (rows, columns))


def two_factor_chains(shape: tuple[int, int]) -> list[Chain]:
    """Return two-factor chains with nearly square blocks, from large to small.

    A rank costs least in square blocks. The first chain has one block and is a plain low-rank
    product.
    """
    side, chains = max(shape), []
    for parts in sorted(base << k for base in (1, 3) for k in range(side.bit_length())):
        n_blocks = [_near_divisor(n, max(1.0, n * parts / side)) for n in shape]
        chains.append(two_factor_chain(shape, (n_blocks[0], n_blocks[1])))
    return list(dict.fromkeys(chains))


def prime_factors(n: int) -> list[int]:
    """Return the prime factors of `n`, ascending."""
    factors, p = [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors


def _group(factors: list[int], n_groups: int) -> tuple[int, ...]:
    """Multiply primes greedily into `n_groups` nearly equal products, descending."""
    groups = [1] * n_groups
    for factor in sorted(factors, reverse=True):
        groups[groups.index(min(groups))] *= factor
    return tuple(sorted(groups, reverse=True))


def digit_reversal(radices: Sequence[int]) -> np.ndarray:
    """Return the digit reversal for numbers written in `radices`.

    For radices of 2 it is the bit reversal.
    """
    return np.arange(math.prod(radices)).reshape(tuple(radices)[::-1]).transpose().ravel()


def even_odd(n: int) -> np.ndarray:
    """Return the even numbers below `n`, ascending, then the odd ones, descending.

    Source: J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP
    28(1), 1980.
    """
    return np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])


def _near_divisor(n: int, target: float) -> int:
    """Return the divisor of `n` nearest in ratio to `target`; rounded `target` if none is near."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    nearest = min(
        [*small, *(n // k for k in reversed(small))], key=lambda k: abs(math.log(k / target))
    )
    return nearest if 2 / 3 <= nearest / target <= 3 / 2 else min(n, round(target))
