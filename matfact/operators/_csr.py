"""Sparse factor in compressed sparse row (CSR) format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy.sparse

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program

#: Entries of a mask expanded at a time; few enough to reuse memory.
_ENTRIES = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparseFactor(Factor):
    """Sparse matrix in compressed sparse row (CSR) format.

    Parameters
    ----------
    values : array of shape (nnz,)
        Stored values, row after row.
    indices : ndarray of shape (nnz,)
        Column of each value.
    indptr : ndarray of shape (rows + 1,)
        Start of each row in `values`.
    n_columns : int
        Number of columns.
    """

    indices: np.ndarray
    indptr: np.ndarray
    n_columns: int

    kind: ClassVar[str] = "csr"

    @classmethod
    def from_dense(cls, array: Array, support: Array | None = None) -> SparseFactor:
        """Return the entries of `array` on `support` (by default its nonzeros) as a factor."""
        xp = backend.namespace(array)
        places = backend.flatnonzero(array != 0 if support is None else support)
        values = xp.take(xp.reshape(array, (-1,)), places, axis=0)
        return cls.from_locations(values, backend.to_numpy(places), tuple(array.shape))

    @classmethod
    def from_locations(
        cls, values: Array, locations: np.ndarray, shape: tuple[int, int]
    ) -> SparseFactor:
        """Return a factor with `values` at increasing `locations` in the flattened matrix."""
        rows, columns = shape
        begins = np.arange(rows + 1) * columns
        indptr = np.searchsorted(locations, begins)
        indices = locations - np.repeat(begins[:-1], np.diff(indptr))
        return cls(values, indices.astype(_narrow(columns)), indptr, columns)

    @classmethod
    def from_bits(cls, values: Array, bits: np.ndarray, shape: tuple[int, int]) -> SparseFactor:
        """Return a factor with `values`, in order, where bits of ``np.packbits`` are set."""
        rows, columns = shape
        counts, indptr = _row_counts(bits, shape), np.zeros(rows + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        if indptr[-1] != len(values):
            raise ValueError(f"{len(values)} values must have as many bits")
        indices = np.empty(len(values), _narrow(columns))
        # Numbers larger than columns wrap around, and back again.
        begins = (np.arange(min(rows, _step(columns))) * columns).astype(indices.dtype)
        for span, mask in _masks(bits, shape):
            part = indices[indptr[span.start] : indptr[span.stop]]
            part[:] = np.flatnonzero(mask)
            part -= np.repeat(begins[: span.stop - span.start], counts[span])
        factor = cls(values, indices, indptr, columns)
        vars(factor)["bits"] = bits  # saves packing them again
        return factor

    @functools.cached_property
    def bits(self) -> np.ndarray:
        """Mask of stored entries, one bit per entry, as packed by `numpy.packbits`."""
        mask = np.zeros(self.shape[0] * self.shape[1], dtype=np.bool_)
        mask[self.locations] = True
        return np.packbits(mask)

    @property
    def is_ordered(self) -> bool:
        """Whether values are in the order of their bits, without duplicates."""
        return "bits" in vars(self) or not (np.diff(self.locations) <= 0).any()

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
            values,
            order.indices.astype(_narrow(self.shape[0])),
            order.indptr.astype(np.int64),
            self.shape[0],
        )

    @functools.cached_property
    def _operand(self) -> Array:
        """Operator applied to `X`: SciPy's CSR matrix for NumPy, else a dense array."""
        values = backend.compute_array(self.values)
        if backend.is_numpy(values):
            return self._scipy(values)
        return self.with_values(values).toarray()

    def _scipy(self, values: np.ndarray) -> scipy.sparse.csr_array:
        # SciPy copies indices whose dtype differs from that of the row pointers.
        indptr = self.indptr.astype(np.result_type(self.indices, np.min_scalar_type(-self.nnz)))
        return scipy.sparse.csr_array((values, self.indices, indptr), shape=self.shape)

    def apply(self, X: Array) -> Array:
        if backend.is_numpy(X):
            return self._operand @ X
        return backend.namespace(X).matmul(self._operand, X)

    def add_to(self, program: Program) -> None:
        program.add_csr(self.values, self.indices, self.indptr)

    def toarray(self) -> Array:
        if backend.is_numpy(self.values) and self.values.dtype != np.float16:  # SciPy lacks float16
            return self._scipy(self.values).toarray()
        xp = backend.namespace(self.values)
        rows, columns = self.shape
        # Gathers, since the Array API has no scatter; position 0 holds a zero.
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
        column_bytes = np.dtype(_narrow(columns)).itemsize
        indices = column_bytes * self.nnz + 4 * (rows + 1)
        return min(bits, indices) if format == "smallest" else indices


def _masks(bits: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the mask, a few rows at a time."""
    rows, columns = shape
    for first in range(0, rows, _step(columns)):
        last = min(first + _step(columns), rows)
        packed = bits[first * columns // 8 : -(-last * columns // 8)]
        mask = np.unpackbits(packed, count=(last - first) * columns)
        yield slice(first, last), mask.view(np.bool_)


def _step(columns: int) -> int:
    """Return the number of mask rows expanded at a time, aligned to whole bytes."""
    return 8 * max(1, _ENTRIES // (8 * max(1, columns)))


def _row_counts(bits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the number of bits set in each row."""
    rows, columns = shape
    if columns % 8 == 0:
        return np.bitwise_count(bits).reshape(rows, columns // 8).sum(axis=1, dtype=np.int64)
    counts = np.zeros(rows, np.int64)
    for span, mask in _masks(bits, shape):
        counts[span] = mask.reshape(-1, columns).sum(axis=1)
    return counts


def _narrow(columns: int) -> type[np.integer[Any]]:
    """Return the dtype of column numbers, the narrow one that the kernels read."""
    return np.uint16 if columns <= 1 << 16 else np.int32
