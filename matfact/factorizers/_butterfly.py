"""Butterfly factorization for any shape, radices and ranks."""

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
    """Product of Kronecker-sparse factors, such as butterfly and Monarch matrices.

    The supports are fixed in advance, so a layer with n inputs takes O(n log n) operations and
    stores no indices. The factors are found by hierarchical identification (Le et al., 2022; Zheng
    et al., 2023), with one batch of small singular value decompositions per factor, and then
    improved by sweeps of alternating least squares. Exact butterflies, including Hadamard, Fourier
    and cosine transforms, are recovered to rounding. `W` may have any shape: sides with a prime
    factor above 5 are padded with zeros, and values stored for the padding count.

    Parameters
    ----------
    method : {"hierarchical", "gradient"}, default="hierarchical"
        "hierarchical" finds the factors as described above; "gradient" continues with gradient
        descent on all factors jointly (Dao et al., 2019). Sweeps usually reach the same error in
        less time, so try descent only when more sweeps stop helping. For products that need descent
        see `KaleidoscopeFit`.
    chain : {"auto", "square_dyadic", "monarch"} or list of (a, b, c, d), default="auto"
        Supports ``I_a ⊗ 1_{b×c} ⊗ I_d`` of the factors, from left to right. "square_dyadic"
        uses one factor per prime factor of the sides, radix 2 for powers of two; "monarch" uses
        two factors with about √n blocks; a list gives the supports explicitly and may describe a
        product larger than `W`. "auto" means "square_dyadic" unless a density is given; then it
        tries chains of several lengths, and several block sizes for two factors, and keeps the
        best.
    rank : int or None, default=None
        Rank of the blocks into which each split between two factors cuts the product, limited by
        the size of the blocks. None takes the largest rank that fits `density`, or 1 without a
        density. Must be None when `chain` is a list.
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. None stores what `chain` and
        `rank` require.
    permutation : {"identity", "bit_reversal", "dct", "idct", "auto", "learned"} or array-like of \
int of shape (in_features,), default="identity"
        Column order in which `W` is close to a butterfly: ``W[:, permutation]``. "bit_reversal"
        suits the Fourier transform (it reverses digits in the radices of the chain), "dct" the
        cosine and sine transforms of type II (exact with ``rank=2``), and "idct" their inverses
        (type III), which also permute rows. "auto" tries these four and keeps the best.
        "learned" finds an order by clustering columns at each split, and keeps it if it is
        better than the identity; it finds any order of a rank-one butterfly.
    max_iter : int, default=10
        Maximum number of sweeps, and of descent steps.
    tol : float, default=5e-3
        Stop when a sweep, or ten descent steps, reduce the squared error by less than this
        fraction.

    Attributes
    ----------
    patterns_ : list of tuple of int
        The (a, b, c, d) of each factor.
    operator_ : FactorProduct
        The product of the factors and of any permutations and paddings.
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
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Number of sweeps and descent steps; 1 for two factors, which have a closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled and padded `W`) and ``seconds``, after the
        identification and after each sweep.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - Q.-T. Le, L. Zheng, E. Riccietti, R. Gribonval, "Fast learning of fast transforms, with
      guarantees", ICASSP 2022.
    - L. Zheng, E. Riccietti, R. Gribonval, "Efficient identification of butterfly sparse
      matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023.
    - T. Dao, A. Gu, M. Eichhorn, A. Rudra, C. Ré, "Learning fast algorithms for linear
      transforms using butterfly factorizations", ICML 2019.

    Examples
    --------
    >>> from scipy.linalg import hadamard
    >>> from matfact import ButterflyFit
    >>> model = ButterflyFit().fit(hadamard(64))
    >>> len(model.factors_), model.density_, bool(model.reconstruction_err_ < 1e-12)
    (6, 0.1875, True)
    """

    _side_power = 2.0
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
        """Return the candidate of least error, or the smallest exact one."""
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
            raise ValueError(f"rank must be None when chain is a list, got {self.rank}.")
        chain = Chain.from_patterns(patterns)
        if chain.shape[0] < shape[0] or chain.shape[1] < shape[1]:
            raise ValueError(
                f"chain must give a product of at least {shape[0]}×{shape[1]}, the shape of W, "
                f"got {chain.shape[0]}×{chain.shape[1]}."
            )
        if math.prod(chain.shape) > room(shape):
            raise ValueError(
                f"chain must give a product of at most {room(shape)} entries for a "
                f"{shape[0]}×{shape[1]} matrix, got {chain.shape[0]}×{chain.shape[1]}."
            )
        return chain

    def _orders(self, chain: Chain, W: Array) -> list[_Orders]:
        """Return the row and column orders to try."""
        shape = W.shape
        if not isinstance(self.permutation, str):
            order = np.asarray(self.permutation)
            if order.shape != shape[1:] or not np.array_equal(np.sort(order), np.arange(shape[1])):
                raise ValueError(
                    f"permutation must hold each column index of W, 0 to {shape[1] - 1}, exactly "
                    f"once; got an array of shape {order.shape}."
                )
            return [(None, order)]
        if self.permutation == "learned":
            target = backend.to_numpy(Layout.of(W, chain).arrange(W))
            return [(None, None), (None, learned_order(target, chain))]
        names = [n for n in _ORDERS if self.permutation in (n, "auto")]
        return [_named_orders(name, chain) for name in names]


def _named_orders(name: str, chain: Chain) -> _Orders:
    """Return the row and column orders called `name`."""
    if name == "identity":
        return (None, None)
    rows, columns = chain.shape
    reversal = digit_reversal(chain.column_radices)
    if name == "bit_reversal":
        return (None, reversal)
    return (None, even_odd(columns)[reversal]) if name == "dct" else (even_odd(rows), reversal)


def _loss(W: Array, chain: Chain) -> float:
    """Return the squared error of `chain` after one sweep."""
    if len(chain.patterns) == 2:
        return monarch_loss(W, chain)
    trial = History()
    butterfly(W, chain, max_iter=1, callback=trial)
    return trial.objective[-1]
