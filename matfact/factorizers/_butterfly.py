"""Fit of butterfly products, of any shape, radices and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions

from matfact import backend, metrics
from matfact.backend import Array
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._chain import Layout
from matfact.factorizers._validation import room
from matfact.solvers._callback import History
from matfact.solvers.butterfly import butterfly
from matfact.solvers.chains import (
    Chain,
    dense_chain,
    digit_reversal,
    dyadic_chain,
    even_odd,
    grouped_chain,
    square_root_chain,
    two_factor_chains,
)
from matfact.solvers.descent import descend
from matfact.solvers.monarch import monarch, monarch_loss
from matfact.solvers.ordering import learned_order

_Orders = tuple[np.ndarray | None, np.ndarray | None]
_ORDERS = ("identity", "bit_reversal", "dct", "idct")


class ButterflyFit(BaseFactorizer):
    """Kronecker-sparse factors: butterflies, Monarch matrices and what lies between.

    The supports are fixed in advance, so that a layer of n inputs needs O(n log n) operations
    and no indices. All factors are found by hierarchical identification [1]_, [2]_, one batch of
    small singular value decompositions a factor, then improved by sweeps of alternating least
    squares. Exact butterflies (Hadamard, Fourier and cosine transforms among them) are recovered
    to rounding. Any shape will do: sides with a prime factor above 5 are padded with zeros, whose
    stored values count.

    Parameters
    ----------
    method : {"hierarchical", "gradient"}, default="hierarchical"
        How the factors are found: as above, or followed by descent on the values of all factors
        at once [3]_. Sweeps reach the same errors in less time, so that descent is worth a try
        only where their number does not help any more. :class:`KaleidoscopeFit` has products that
        need descent.
    chain : {"auto", "square_dyadic", "monarch"} or list of (a, b, c, d), default="auto"
        Supports ``I_a ⊗ 1_{b×c} ⊗ I_d`` of the factors, from left to right. "square_dyadic"
        takes as many factors as the prime factors of the sides allow, radix 2 for powers of two;
        "monarch" takes two, with about √n blocks; a list takes what it says, and may be larger
        than `W`. "auto" is "square_dyadic" unless a density is given; then chains of several
        lengths, and for two factors blocks of several sizes, are tried, and the best is kept.
    rank : int or None, default=None
        Rank of the blocks that cut the product between two factors, cut where blocks are
        smaller. None takes the largest that fits `density`, or 1 where that is None. Must be
        None when `chain` is a list.
    density : float or None, default=None
        Stored values ÷ entries of `W`, in (0, 1]; never exceeded. None stores what `chain` and
        `rank` ask for.
    permutation : {"identity", "bit_reversal", "dct", "idct", "auto", "learned"} or array-like of \
int of shape (in_features,), default="identity"
        Order of the columns of `W` in which it is to be a butterfly: ``W[:, permutation]``.
        "bit_reversal" is that of the Fourier transform (reversal of the digits in the radices of
        the chain), "dct" that of the cosine and sine transforms (types II, exact with
        ``rank=2``), "idct" that of their inverses (types III), where rows move too. "auto" tries
        these four and keeps the best. "learned" looks for an order, by clustering columns cut
        after cut, and keeps it where it is better than none: any order of a butterfly of rank one
        is found.
    max_iter : int, default=10
        Largest number of sweeps, and of descent steps.
    tol : float, default=5e-3
        Stop when a sweep, or ten descent steps, lower the squared error by less than this
        fraction.

    Attributes
    ----------
    patterns_ : list of tuple of int
        The (a, b, c, d) of each factor.
    operator_ : FactorProduct
        The product of the factors, and of the permutations and paddings there are.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the file that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Sweeps and descent steps done; 1 for two factors, whose solution is in closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled and padded `W`) and ``seconds``, after the
        identification and after each sweep.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    References
    ----------
    .. [1] Q.-T. Le, L. Zheng, E. Riccietti, R. Gribonval, "Fast learning of fast transforms, with
       guarantees", ICASSP 2022.
    .. [2] L. Zheng, E. Riccietti, R. Gribonval, "Efficient identification of butterfly sparse
       matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023.
    .. [3] T. Dao, A. Gu, M. Eichhorn, A. Rudra, C. Ré, "Learning fast algorithms for linear
       transforms using butterfly factorizations", ICML 2019.

    Examples
    --------
    >>> from scipy.linalg import hadamard
    >>> from matfact import ButterflyFit
    >>> model = ButterflyFit().fit(hadamard(64))
    >>> len(model.factors_), model.density_, bool(model.reconstruction_err_ < 1e-12)
    (6, 0.1875, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "method": [StrOptions({"hierarchical", "gradient"})],
        "chain": [StrOptions({"auto", "square_dyadic", "monarch"}), list, tuple, None],
        "rank": [Interval(Integral, 1, None, closed="left"), None],
        "density": DENSITY,
        "permutation": [
            StrOptions({*_ORDERS, "auto", "learned"}),
            "array-like",
        ],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
    }
    _allow_complex: ClassVar[bool] = True

    def __init__(
        self,
        method: str = "hierarchical",
        chain: str | Sequence[tuple[int, int, int, int]] | None = "auto",
        rank: int | None = None,
        density: float | None = None,
        permutation: Any = "identity",
        max_iter: int = 10,
        tol: float = 5e-3,
    ) -> None:
        self.method = method
        self.chain = chain
        self.rank = rank
        self.density = density
        self.permutation = permutation
        self.max_iter = max_iter
        self.tol = tol

    def _factorize(self, W: Array, history: History) -> Factorization:
        candidates = [
            (chain, Layout.of(W, chain, *orders))
            for chain in self._chains(W.shape)
            for orders in self._orders(chain, W)
        ]
        chain, layout = self._best(W, candidates)
        target, n_iter = layout.arrange(W), 1
        if len(chain.patterns) == 2:
            values = monarch(target, chain, callback=history)
        else:
            values, n_iter = butterfly(
                target, chain, max_iter=self.max_iter, tol=self.tol, callback=history
            )
        if self.method == "gradient":
            values, n_steps = descend(
                target, values, max_iter=self.max_iter, tol=self.tol, callback=history
            )
            n_iter += n_steps
        self.patterns_ = chain.patterns
        return Factorization(layout.factors(values), max(1, n_iter))

    @staticmethod
    def _best(W: Array, candidates: list[tuple[Chain, Layout]]) -> tuple[Chain, Layout]:
        """Return the candidate of least error, or the smallest of those that are exact."""
        if len(candidates) == 1:
            return candidates[0]
        eps = backend.namespace(W).finfo(W.dtype).eps
        rounding = 100 * eps * backend.norm(W) ** 2
        losses = [_loss(layout.arrange(W), chain) for chain, layout in candidates]
        best = min(
            range(len(candidates)),
            key=lambda i: (max(losses[i], rounding), candidates[i][0].nnz),
        )
        return candidates[best]

    def _chains(self, shape: tuple[int, int]) -> list[Chain]:
        """Return the chains that fit the parameters."""
        named = self.chain is None or isinstance(self.chain, str)
        chains = self._named_chains(shape) if named else [self._custom_chain(shape)]
        if self.rank is not None:
            chains = [chain.with_rank(self.rank) for chain in chains]
        if self.density is None:
            return chains
        least = min(chain.nnz for chain in chains)
        budget = metrics.stored_value_budget(self.density, shape, minimum=least)
        if self.rank is None and named:
            return [fitting for chain in chains if (fitting := chain.within(budget))]
        return [chain for chain in chains if chain.nnz <= budget]

    def _named_chains(self, shape: tuple[int, int]) -> list[Chain]:
        """Return the rank-one chains that `chain` names."""
        if self.chain == "monarch":
            return [square_root_chain(shape)]
        deepest = dyadic_chain(shape)
        if self.chain == "square_dyadic" or self.density is None:
            return [deepest]
        n_factors = len(deepest.patterns)
        depths = {min(depth, n_factors) for depth in (3, (n_factors + 1) // 2, n_factors)}
        deeper = [grouped_chain(shape, depth) for depth in sorted(depths) if depth > 2]
        return [dense_chain(shape), *two_factor_chains(shape), *deeper]

    def _custom_chain(self, shape: tuple[int, int]) -> Chain:
        """Return the chain given as a list of patterns."""
        patterns: list[Any] = [tuple(pattern) for pattern in self.chain or ()]
        sound = bool(patterns) and all(
            len(pattern) == 4 and all(isinstance(n, (int, np.integer)) and n >= 1 for n in pattern)
            for pattern in patterns
        )
        if not sound:
            raise ValueError(
                "chain must be a name or a list of (a, b, c, d), each four positive integers, "
                f"got {self.chain}."
            )
        if self.rank is not None:
            raise ValueError(
                f"rank must be None when chain is a list, which says it all, got {self.rank}."
            )
        chain = Chain.from_patterns(patterns)
        if chain.shape[0] < shape[0] or chain.shape[1] < shape[1]:
            raise ValueError(
                f"chain must make a product of at least {shape[0]}×{shape[1]}, the shape of W, "
                f"got one of {chain.shape[0]}×{chain.shape[1]}."
            )
        if math.prod(chain.shape) > room(shape):
            raise ValueError(
                f"chain must make a product of at most {room(shape)} entries for a "
                f"{shape[0]}×{shape[1]} matrix, got one of {chain.shape[0]}×{chain.shape[1]}."
            )
        return chain

    def _orders(self, chain: Chain, W: Array) -> list[_Orders]:
        """Return the orders of rows and of columns to try."""
        shape = W.shape
        if not isinstance(self.permutation, str):
            order = np.asarray(self.permutation)
            if order.shape != shape[1:] or not np.array_equal(np.sort(order), np.arange(shape[1])):
                raise ValueError(
                    f"permutation must hold each of 0 … {shape[1] - 1} once, as W has "
                    f"{shape[1]} columns, got an array of shape {order.shape}."
                )
            return [(None, order)]
        if self.permutation == "learned":
            target = backend.to_numpy(Layout.of(W, chain).arrange(W))
            return [(None, None), (None, learned_order(target, chain))]
        names = [n for n in _ORDERS if self.permutation in (n, "auto")]
        return [_named_orders(name, chain) for name in names]


def _named_orders(name: str, chain: Chain) -> _Orders:
    """Return the orders of rows and of columns that `name` stands for."""
    if name == "identity":
        return (None, None)
    rows, columns = chain.shape
    reversal = digit_reversal(chain.column_radices)
    if name == "bit_reversal":
        return (None, reversal)
    return (None, even_odd(columns)[reversal]) if name == "dct" else (even_odd(rows), reversal)


def _loss(W: Array, chain: Chain) -> float:
    """Return the squared error to expect of `chain`, after a single sweep."""
    if len(chain.patterns) == 2:
        return monarch_loss(W, chain)
    trial = History()
    butterfly(W, chain, max_iter=1, callback=trial)
    return trial.objective[-1]
