"""Shapes of butterfly and Monarch products: chains of Kronecker-sparse supports."""

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
    """Supports ``I_a ⊗ 1_{b×c} ⊗ I_d`` of factors whose product has blocks of low rank.

    Rows are numbered by digits in the radices ``β_1 … β_L``, columns by digits in
    ``γ_1 … γ_L``, the first digit most significant. Cut after factor l, the product falls into
    blocks: the last L − l row digits and the first l column digits say which, and its rank is at
    most ``r_l``. Factor l has (``r_0 = r_L = 1``)

        a = γ_1 ⋯ γ_{l-1},   b = r_{l-1} β_l,   c = r_l γ_l,   d = β_{l+1} ⋯ β_L.

    Source: L. Zheng, E. Riccietti, R. Gribonval, "Efficient identification of butterfly sparse
    matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023, with ranks above one added.

    Parameters
    ----------
    row_radices, column_radices : tuple of int
        ``β`` and ``γ``, one entry a factor.
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
        """Values the factors store."""
        return sum(math.prod(pattern) for pattern in self.patterns)

    @property
    def rank_limits(self) -> tuple[int, ...]:
        """The ranks above which nothing can be gained: those of the blocks' smaller sides."""
        rows = accumulate(self.row_radices[:-1], int.__mul__)
        columns = accumulate(reversed(self.column_radices[1:]), int.__mul__)
        return tuple(map(min, rows, reversed(list(columns))))

    def with_rank(self, rank: int) -> Chain:
        """Return the chain whose ranks are `rank`, or their limit where that is less."""
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
        """Read the radices and ranks off a list of (a, b, c, d), which must chain."""
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
    """Return the rank-one chain with as many factors as `shape` allows.

    Its radices are 2 where the sides are powers of two. Sides with a prime factor above 5 are
    padded to the next length without one.
    """
    return grouped_chain(shape, max(shape))


@functools.lru_cache
def grouped_chain(shape: tuple[int, int], n_factors: int) -> Chain:
    """Return the rank-one chain of `n_factors` factors, or as many as possible, for `shape`."""
    primes = [prime_factors(scipy.fft.next_fast_len(n, real=True)) for n in shape]
    n_factors = min(n_factors, *map(len, primes))
    if n_factors <= 1:
        return dense_chain(shape)
    beta, gamma = (_group(factors, n_factors) for factors in primes)
    chain = Chain(beta, gamma, (1,) * (n_factors - 1))
    # Padding can cost tiny matrices more than it saves.
    return chain if chain.nnz <= math.prod(shape) else dense_chain(shape)


def two_factor_chain(shape: tuple[int, int], n_blocks: tuple[int, int]) -> Chain:
    """Return the rank-one chain of two factors with these numbers of blocks, left and right."""
    (rows, columns), (left, right) = shape, n_blocks
    return Chain((math.ceil(rows / left), left), (right, math.ceil(columns / right)), (1,))


def square_root_chain(shape: tuple[int, int]) -> Chain:
    """Return the rank-one chain of two factors whose blocks are about as many as their rows."""
    rows, columns = (_near_divisor(n, math.sqrt(n)) for n in shape)
    return two_factor_chain(shape, (rows, columns))


def two_factor_chains(shape: tuple[int, int]) -> list[Chain]:
    """Return two-factor chains of ever smaller blocks, as square as the sides allow.

    Square blocks are those whose rank costs least. The first chain has one block, so that it is
    a plain product of low rank.
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
    """Return `n_groups` products, as equal as the greedy choice makes them, descending."""
    groups = [1] * n_groups
    for factor in sorted(factors, reverse=True):
        groups[groups.index(min(groups))] *= factor
    return tuple(sorted(groups, reverse=True))


def digit_reversal(radices: Sequence[int]) -> np.ndarray:
    """Return the order that reads numbers, written in `radices`, from their last digit on.

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
    """Return the divisor of `n` nearest in ratio to `target`, or the integer if none is near."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    nearest = min(
        [*small, *(n // k for k in reversed(small))], key=lambda k: abs(math.log(k / target))
    )
    return nearest if 2 / 3 <= nearest / target <= 3 / 2 else min(n, round(target))
