"""A dense matrix of signs, one bit an entry."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._dense import DenseFactor
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SignFactor(Factor):
    """A matrix with entries 1 and −1.

    Parameters
    ----------
    values : array of shape (0,)
        Empty: it only carries the library, device and dtype.
    bits : ndarray of uint8
        One bit an entry, row after row, as `numpy.packbits` packs them: 1 stands for 1 and
        0 for −1.
    dimensions : tuple of int
        Rows and columns of the matrix.
    """

    bits: np.ndarray
    dimensions: tuple[int, int]

    kind: ClassVar[str] = "sign"

    @classmethod
    def from_dense(cls, array: Array) -> SignFactor:
        """Store the signs of `array`, that of 0 as 1."""
        empty = backend.like(np.zeros(0), array, dtype=array.dtype)
        bits = np.packbits(backend.to_numpy(array >= 0))
        return cls(empty, bits, (int(array.shape[0]), int(array.shape[1])))

    @property
    def shape(self) -> tuple[int, int]:
        return self.dimensions

    @property
    def nnz(self) -> int:
        """Number of entries: none is zero."""
        return self.dimensions[0] * self.dimensions[1]

    @property
    def flops(self) -> int:
        """Additions for one sample: nothing is multiplied."""
        return self.nnz

    @property
    def locations(self) -> np.ndarray:
        return np.arange(self.nnz)

    @functools.cached_property
    def _signs(self) -> np.ndarray:
        """The matrix as int8."""
        bits = np.unpackbits(self.bits, count=self.nnz).view(np.int8)
        return (2 * bits - 1).reshape(self.dimensions)

    @property
    def T(self) -> SignFactor:  # noqa: N802
        rows, columns = self.dimensions
        return SignFactor(self.values, np.packbits(self._signs.T > 0), (columns, rows))

    def apply(self, X: Array) -> Array:
        xp = backend.namespace(X)
        return xp.matmul(xp.astype(backend.like(self._signs, X), X.dtype), X)

    @property
    def is_coded(self) -> bool:
        return True

    def suits_bytes(self) -> bool:
        return True

    def add_to(self, program: Program) -> None:
        if program.stored == "int8":
            program.add_signs(self.bits, self.dimensions)
        else:
            DenseFactor(self.toarray()).add_to(program)

    def toarray(self) -> Array:
        return backend.like(self._signs, self.values, dtype=self.values.dtype)

    def scaled(self, c: float) -> Self:
        raise TypeError("a sign factor stores no value that could be scaled")

    def value_nbytes(self) -> int:
        return -(-self.nnz // 8)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"SignFactor({rows}×{columns})"
