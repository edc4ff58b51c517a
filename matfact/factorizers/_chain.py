"""What the estimators with chains of Kronecker-sparse factors share: order, padding, choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators import Factor, KroneckerSparseFactor, SelectionFactor
from matfact.solvers.chains import Chain
from matfact.solvers.monarch import monarch_loss

#: Entries from which losses are estimated first, and the number of slices that takes.
_LARGE, _SAMPLE = 1 << 20, 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows and columns of a matrix stand in the product of a chain.

    Parameters
    ----------
    rows, columns : SelectionFactor
        They gather the rows (columns) of the matrix, zeros where the product is longer.
    """

    rows: SelectionFactor
    columns: SelectionFactor

    @classmethod
    def of(
        cls,
        W: Array,
        chain: Chain,
        row_order: np.ndarray | None = None,
        column_order: np.ndarray | None = None,
    ) -> Layout:
        """Lay out `W`, in its own order by default, and what `chain` needs beyond it."""
        return cls(
            *(
                SelectionFactor.from_index(_order(order, n, padded), n, like=W)
                for order, n, padded in zip(
                    (row_order, column_order), W.shape, chain.shape, strict=True
                )
            )
        )

    @classmethod
    def permuted(cls, W: Array, row_order: np.ndarray, column_order: np.ndarray) -> Layout:
        """Lay out `W` with its rows and columns in other orders."""
        orders = zip((row_order, column_order), W.shape, strict=True)
        return cls(*(SelectionFactor.from_index(order, n, like=W) for order, n in orders))

    def arrange(self, W: Array) -> Array:
        """Return the matrix the product of the chain has to match."""
        return self.arrange_columns(W if _is_identity(self.rows) else self.rows.apply(W))

    def arrange_columns(self, W: Array) -> Array:
        """Return `W` with its columns where the product of the chain has them."""
        return W if _is_identity(self.columns) else self.columns.T.apply_right(W)

    def factors(self, values: list[Array]) -> list[Factor]:
        """Return the factors of the matrix itself."""
        return self.around([KroneckerSparseFactor(array) for array in values])

    def around(self, factors: Sequence[Factor]) -> list[Factor]:
        """Return factors of what :meth:`arrange` arranges, turned into those of the matrix."""
        factors = list(factors)
        if not _is_identity(self.rows):
            factors.insert(0, self.rows.T)
        if not _is_identity(self.columns):
            factors.append(self.columns)
        return factors


def _order(order: np.ndarray | None, n: int, padded: int) -> np.ndarray:
    """Return which of `n` entries stands at each of `padded` places, −1 for none."""
    if order is None:
        order = np.arange(padded)
    elif len(order) < padded:
        order = np.concatenate([order, np.full(padded - len(order), n)])
    return np.where(order < n, order, -1)


def _is_identity(selection: SelectionFactor) -> bool:
    """Whether `selection` moves nothing."""
    rows, columns = selection.shape
    return rows == columns and bool((selection.index == np.arange(rows)).all())


def best_two_factor_chain(W: Array, chains: list[Chain]) -> Chain:
    """Return the chain with the nearest Monarch matrix, the first unless others are better.

    Losses of large matrices are estimated from some of their slices, and computed for the chains
    that look best: what is returned is never worse than the first.
    """
    if len(chains) == 1:
        return chains[0]
    targets = [Layout.of(W, chain).arrange(W) for chain in chains]
    sample = _SAMPLE if math.prod(W.shape) >= _LARGE else None
    losses = [
        monarch_loss(target, chain, n_slices=sample if i else None)
        for i, (target, chain) in enumerate(zip(targets, chains, strict=True))
    ]
    # Above the rounding of the losses, so that the choice is never worse than the first.
    losses[0] -= 1e-12 * backend.norm(W) ** 2
    known = [0] if sample else [*range(len(chains))]
    while (best := min(range(len(chains)), key=losses.__getitem__)) not in known:
        losses[best] = monarch_loss(targets[best], chains[best])
        known = [*known, best]
    return chains[best]
