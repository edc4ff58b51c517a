"""Projection onto Monarch matrices."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from sklearn.utils._param_validation import Interval

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._chain import Layout, best_two_factor_chain
from matfact.operators import Factor, FactorProduct
from matfact.solvers._callback import History
from matfact.solvers.chains import Chain, two_factor_chain, two_factor_chains
from matfact.solvers.grouping import low_rank_groups
from matfact.solvers.monarch import monarch, monarch_loss


class MonarchProjector(BaseFactorizer):
    """Product of two block-diagonal factors with a fixed permutation between them.

    A Monarch matrix is ``P L Pᵀ R`` with L and R block-diagonal. Equivalently, the rows with the
    same remainder modulo the number of blocks of L and the columns in the same block of R form a
    block of low rank. The nearest Monarch matrix therefore takes one truncated singular value
    decomposition per block (Dao et al., 2022). The matrix may have any shape and the blocks any
    rank; sides that the blocks do not divide are padded with zeros, and values stored for the
    padding count. With ``fit(W, calibration=X)`` the error of the outputs is minimized instead.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. None means 0.25, raised if
        needed to the minimum of the structure, or what `rank` and `n_blocks` require if both are
        given.
    n_blocks : int, tuple of two int or None, default=None
        Number of blocks of L and of R. None tries several sizes of nearly square blocks and
        keeps the best for the density, including a single block: the truncated singular value
        decomposition of `W`.
    rank : int or None, default=None
        Rank of each block. None takes the largest rank that fits the density.
    permute : bool, default=False
        Whether to permute rows and columns so that the blocks are closer to low rank. This takes
        seconds for a thousand rows and helps if related rows and columns are scattered; the
        error of trained weights drops by a few per cent at most. Permutations do not count as
        stored values.

    Attributes
    ----------
    n_blocks_ : tuple of int
        Number of blocks of L and of R.
    rank_ : int
        Rank of each block.
    operator_ : FactorProduct
        The product of the two factors and of any cropping or padding.
    factors_ : tuple of Factor
        Its factors, ``P L Pᵀ`` and R.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    layer_err_ : float
        ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for the calibration inputs `X`; only with calibration.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        1: the solution has a closed form.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`, or squared layer error with calibration)
        and ``seconds``, one entry.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - T. Dao, B. Chen, N. Sohoni, A. Desai, M. Poli, J. Grogan, A. Liu, A. Rao, A. Rudra,
      C. Ré, "Monarch: expressive structured matrices for efficient and accurate training",
      ICML 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import MonarchProjector
    >>> W = np.fft.fft(np.eye(16)).reshape(16, 4, 4).swapaxes(1, 2).reshape(16, 16)
    >>> model = MonarchProjector(n_blocks=4, rank=1).fit(W)
    >>> model.nnz_, bool(model.reconstruction_err_ < 1e-14)
    (128, True)
    """

    _side_power = 2.5
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "n_blocks": [Interval(Integral, 1, None, closed="left"), tuple, None],
        "rank": [Interval(Integral, 1, None, closed="left"), None],
        "permute": ["boolean"],
    }
    _allow_complex: ClassVar[bool] = True

    def __init__(
        self,
        density: float | None = None,
        n_blocks: int | tuple[int, int] | None = None,
        rank: int | None = None,
        permute: bool = False,
    ) -> None:
        self.density = density
        self.n_blocks = n_blocks
        self.rank = rank
        self.permute = permute

    def _factorize(self, W: Array, history: History) -> Factorization:
        chains = self._chains(W.shape)
        if self.permute:
            layouts = [_grouped(W, chain) for chain in chains]
            losses = [
                monarch_loss(layout.arrange(W), chain)
                for layout, chain in zip(layouts, chains, strict=True)
            ]
            best = int(np.argmin(losses))
            chain, layout = chains[best], layouts[best]
        else:
            chain = best_two_factor_chain(W, chains)
            layout = Layout.of(W, chain)
        return self._finish(
            chain, layout.factors(monarch(layout.arrange(W), chain, callback=history))
        )

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        fits = []
        for chain in self._chains(W.shape):
            layout = _grouped(W, chain) if self.permute else Layout.of(W, chain)
            moment = layout.arrange_columns(layout.arrange_columns(calibration.second_moment).T).T
            factors = layout.factors(monarch(layout.arrange(W), chain, moment=moment))
            error = metrics.layer_error(W, FactorProduct(factors).toarray(), calibration.gram)
            fits.append((error, chain, factors))
        error, chain, factors = min(fits, key=lambda fit: fit[0])
        history(1, error**2)
        return self._finish(chain, factors)

    def _finish(self, chain: Chain, factors: list[Factor]) -> Factorization:
        self.n_blocks_ = (chain.row_radices[1], chain.column_radices[0])
        self.rank_ = chain.ranks[0]
        return Factorization(factors)

    def _chains(self, shape: tuple[int, int]) -> list[Chain]:
        """Return the chains that fit the parameters."""
        chains = two_factor_chains(shape)
        if self.n_blocks is not None:
            chains = [two_factor_chain(shape, self._checked_blocks(shape))]
        largest = max(chain.rank_limits[0] for chain in chains)
        if self.rank is not None and self.rank > largest:
            raise ValueError(
                f"rank must be at most {largest} for blocks of a {shape[0]}×{shape[1]} matrix "
                f"with n_blocks={self.n_blocks}, got {self.rank}."
            )
        if self.rank is not None:
            chains = [c.with_rank(self.rank) for c in chains if c.rank_limits[0] >= self.rank]
        least = min(chain.nnz for chain in chains)
        if self.rank is not None and self.n_blocks is not None and self.density is None:
            return chains
        budget = metrics.stored_value_budget(self.density, shape, minimum=least)
        if self.rank is not None:
            return [chain for chain in chains if chain.nnz <= budget]
        return [fitting for chain in chains if (fitting := chain.within(budget))]

    def _checked_blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the given numbers of blocks of both factors."""
        given: Any = self.n_blocks
        pair = given if isinstance(given, tuple) else (given, given)
        fits = len(pair) == 2 and all(
            isinstance(n, (int, np.integer)) and 1 <= n <= limit
            for n, limit in zip(pair, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                "n_blocks must be an int or a tuple of two int, from 1 to the sides of the "
                f"{shape[0]}×{shape[1]} matrix, got {given}."
            )
        return (int(pair[0]), int(pair[1]))


def _grouped(W: Array, chain: Chain) -> Layout:
    """Permute the rows and columns of `W` so that its blocks are closer to low rank."""
    target = backend.to_numpy(Layout.of(W, chain).arrange(W))
    (height, left), (right, width) = chain.row_radices, chain.column_radices
    rows = [np.arange(k, height * left, left) for k in range(left)]
    columns = np.split(np.arange(right * width), right)
    rows, columns = low_rank_groups(target, rows, columns, chain.ranks[0])
    return Layout.of(W, chain, np.stack(rows, axis=1).ravel(), np.concatenate(columns))
