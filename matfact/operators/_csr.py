"""A factor with scattered nonzeros, in compressed sparse rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import scipy.sparse

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.kernels.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseFactor(Factor):
    """A sparse matrix in compressed sparse row (CSR) order.

    Parameters
    ----------
    values : array of shape (nnz,)
        Stored values, row after row.
    indices : ndarray of shape (nnz,)
        Column of each value.
    indptr : ndarray of shape (rows + 1,)
        Where each row begins in `values`.
    n_columns : int
        Number of columns.
    """

    indices: np.ndarray
    indptr: np.ndarray
    n_columns: int

    kind: ClassVar[str] = "csr"

    @classmethod
    def from_dense(cls, array: Array, support: Array | None = None) -> SparseFactor:
        """Store the entries of `array` on `support` (by default its nonzeros)."""
        xp = backend.namespace(array)
        mask = backend.to_numpy(array != 0 if support is None else support)
        flat = np.flatnonzero(mask)
        rows, columns = mask.shape
        indptr = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(mask, axis=1), out=indptr[1:])
        values = xp.take(xp.reshape(array, (-1,)), backend.like(flat, array), axis=0)
        return cls(values, (flat % columns).astype(np.int32), indptr, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.indptr) - 1, int(self.n_columns))

    @property
    def locations(self) -> np.ndarray:
        first = np.arange(self.shape[0]) * self.shape[1]
        return np.repeat(first, np.diff(self.indptr)) + self.indices

    @property
    def T(self) -> SparseFactor:  # noqa: N802
        order = self._scipy(np.arange(self.nnz)).T.tocsr()
        xp = backend.namespace(self.values)
        values = xp.take(self.values, backend.like(order.data, self.values), axis=0)
        return SparseFactor(
            values, order.indices.astype(np.int32), order.indptr.astype(np.int64), self.shape[0]
        )

    @functools.cached_property
    def _operand(self) -> Array:
        """What multiplies `X`: SciPy's CSR matrix on NumPy, a dense array elsewhere."""
        values = backend.compute_array(self.values)
        if backend.is_numpy(values):
            return self._scipy(values)
        return self.with_values(values).toarray()

    def _scipy(self, values: np.ndarray) -> scipy.sparse.csr_array:
        return scipy.sparse.csr_array((values, self.indices, self.indptr), shape=self.shape)

    def apply(self, X: Array) -> Array:
        if backend.is_numpy(X):
            return self._operand @ X
        return backend.namespace(X).matmul(self._operand, X)

    def add_to(self, program: Program) -> None:
        program.add_csr(self.values, self.indices, self.indptr)

    def toarray(self) -> Array:
        xp = backend.namespace(self.values)
        rows, columns = self.shape
        # A gather, since the Array API has no scatter: position 0 holds the zero.
        source = np.zeros(rows * columns, dtype=np.int64)
        row_of = np.repeat(np.arange(rows), np.diff(self.indptr))
        source[row_of * columns + self.indices] = np.arange(1, self.nnz + 1)
        zero = backend.like(np.zeros(1), self.values, dtype=self.values.dtype)
        padded = xp.concat([zero, self.values])
        return xp.reshape(
            xp.take(padded, backend.like(source, self.values), axis=0), (rows, columns)
        )

    def index_nbytes(self, format: str) -> int:
        rows, columns = self.shape
        bits = (rows * columns + 7) // 8
        if format == "bitmask":
            return bits
        column_bytes = 2 if columns <= 1 << 16 else 4
        indices = column_bytes * self.nnz + 4 * (rows + 1)
        return min(bits, indices) if format == "smallest" else indices
