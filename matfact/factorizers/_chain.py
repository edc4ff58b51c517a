"""Ordering, padding and choice of chains of Kronecker-sparse factors."""

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

#: Matrix size from which losses are estimated first, and number of slices used to do so.
_LARGE, _SAMPLE = 1 << 20, 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """Position of the rows and columns of a matrix in the product of a chain.

    Parameters
    ----------
    rows, columns : SelectionFactor
        Gather the rows (columns) of the matrix, with zeros where the product is longer.
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
        """Lay out `W`, by default in its own order, padded to the size of `chain`."""
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
        """Lay out `W` with its rows and columns permuted."""
        orders = zip((row_order, column_order), W.shape, strict=True)
        return cls(*(SelectionFactor.from_index(order, n, like=W) for order, n in orders))

    def arrange(self, W: Array) -> Array:
        """Return the matrix that the product of the chain approximates."""
        return self.arrange_columns(W if _is_identity(self.rows) else self.rows.apply(W))

    def arrange_columns(self, W: Array) -> Array:
        """Return `W` with its columns in the order of the product of the chain."""
        return W if _is_identity(self.columns) else self.columns.T.apply_right(W)

    def factors(self, values: list[Array]) -> list[Factor]:
        """Return the factors of the original matrix."""
        return self.around([KroneckerSparseFactor(array) for array in values])

    def around(self, factors: Sequence[Factor]) -> list[Factor]:
        """Turn factors of the arranged matrix into factors of the original one."""
        factors = list(factors)
        if not _is_identity(self.rows):
            factors.insert(0, self.rows.T)
        if not _is_identity(self.columns):
            factors.append(self.columns)
        return factors


def _order(order: np.ndarray | None, n: int, padded: int) -> np.ndarray:
    """Return which of `n` entries is at each of `padded` places, −1 for none."""
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
    """Return the chain with the nearest Monarch matrix; ties go to the first.

    For large matrices, losses are estimated from a few slices and computed exactly only for the
    most promising chains. The result is never worse than the first chain.
    """
    if len(chains) == 1:
        return chains[0]
    targets = [Layout.of(W, chain).arrange(W) for chain in chains]
    sample = _SAMPLE if math.prod(W.shape) >= _LARGE else None
    losses = [
        monarch_loss(target, chain, n_slices=sample if i else None)
        for i, (target, chain) in enumerate(zip(targets, chains, strict=True))
    ]
    # Larger than the rounding of the losses, so that the choice is never worse than the first.
    losses[0] -= 1e-12 * backend.norm(W) ** 2
    known = [0] if sample else [*range(len(chains))]
    while (best := min(range(len(chains)), key=losses.__getitem__)) not in known:
        losses[best] = monarch_loss(targets[best], chains[best])
        known = [*known, best]
    return chains[best]
