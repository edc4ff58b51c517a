"""Permutations, paddings and croppings: factors that store no values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SelectionFactor(Factor):
    """Matrix of zeros and ones with at most one 1 in each row and column.

    Parameters
    ----------
    values : array of shape (0,)
        Empty; gives the library, device and dtype.
    index : ndarray of shape (rows,)
        ``(P @ x)[i] = x[index[i]]``, or 0 if ``index[i]`` is −1.
    n_columns : int
        Number of columns.
    """

    index: np.ndarray
    n_columns: int

    kind: ClassVar[str] = "selection"

    @classmethod
    def from_index(cls, index: Any, n_columns: int, like: Array) -> SelectionFactor:
        """Return the factor that gathers `index`, with the library, device and dtype of `like`."""
        empty = backend.like(np.zeros(0), like, dtype=like.dtype)
        return cls(empty, np.asarray(index, dtype=np.int64), n_columns)

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.index), int(self.n_columns))

    @property
    def T(self) -> SelectionFactor:  # noqa: N802
        inverse = np.full(self.n_columns, -1, dtype=np.int64)
        kept = np.flatnonzero(self.index >= 0)
        inverse[self.index[kept]] = kept
        return SelectionFactor(self.values, inverse, len(self.index))

    def apply(self, X: Array) -> Array:
        return _gather(X, self.index, axis=0)

    def apply_right(self, X: Array) -> Array:
        """Return ``X @ P`` for `X` of shape (batch, rows)."""
        return _gather(X, self.T.index, axis=1)

    def suits_bytes(self) -> bool:
        return True

    def add_to(self, program: Program) -> None:
        program.add_selection(self.index)

    def toarray(self) -> Array:
        xp = backend.namespace(self.values)
        eye = xp.eye(self.n_columns, dtype=self.dtype, device=backend.device(self.values))
        return self.apply(eye)

    def scaled(self, c: float) -> Self:
        raise TypeError("a selection stores no value that could be scaled")

    def index_nbytes(self, format: str) -> int:
        return 4 * len(self.index)


def _gather(X: Array, index: np.ndarray, axis: int) -> Array:
    """Return the rows (columns) `index` of `X`, zeros for −1."""
    xp = backend.namespace(X)
    if (index < 0).any():
        index = np.where(index < 0, X.shape[axis], index)
        shape = (1, X.shape[1]) if axis == 0 else (X.shape[0], 1)
        zeros = xp.zeros(shape, dtype=X.dtype, device=backend.device(X))
        X = xp.concat([X, zeros], axis=axis)
    return xp.take(X, backend.like(index, X), axis=axis)
