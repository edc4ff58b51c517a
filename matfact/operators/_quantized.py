"""A factor whose values are small integers times scales that groups of them share."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._csr import SparseFactor
from matfact.operators._dense import DenseFactor
from matfact.operators._factor import Factor
from matfact.operators._grid import group_numbers

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program

#: Bits of a code that can be stored.
BITS = range(2, 9)
#: Values that share a scale, at most.
LARGEST_GROUP = 1 << 48


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedFactor(Factor):
    """A factor of any storage whose values take few bits each.

    Each value is one of at most ``2**bits`` levels, integers from −127 to 127, times the scale of
    its group. Groups are consecutive values of a row; see `group_bounds`.

    Parameters
    ----------
    values : array of int8
        The level of each value, in the shape that `pattern` uses.
    scales : array of shape (n_groups,)
        Scale of each group. It carries the dtype of the factor; files keep 16 bits of each.
    bits : int
        Bits of a stored code, from 2 to 8.
    group_size : int or None
        Number of values that share a scale, about; None for all values of a row.
    pattern : Factor
        Where the values stand. Its own values are ignored.

    Raises
    ------
    TypeError
        If the values are no integers of a byte, as a network's cast to another dtype are.
    """

    scales: Array
    bits: int
    group_size: int | None
    pattern: Factor

    kind: ClassVar[str] = "quantized"

    def __post_init__(self) -> None:
        dtype = self.values.dtype
        if dtype != backend.namespace(self.values).int8:  # kernels would read other bytes
            raise TypeError(f"values must be codes of dtype int8, got {dtype}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def numbers(self) -> Array:
        return self.scales

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """Where each group begins in the flattened values, and where the last one ends."""
        return group_bounds(self.pattern, self.group_size)

    @property
    def T(self) -> Factor:  # noqa: N802
        """The transpose, whose values are floating point numbers: groups belong to rows."""
        return self.decoded().T

    def decoded(self) -> Factor:
        """Return the factor with floating point values."""
        xp = backend.namespace(self.scales)
        groups = group_numbers(self.bounds)
        scales = xp.take(self.scales, backend.like(groups, self.scales), axis=0)
        levels = xp.astype(self.values, self.dtype)
        return self.pattern.with_values(levels * xp.reshape(scales, levels.shape))

    def with_values(self, values: Array) -> Factor:  # type: ignore[override]
        """Return the same positions holding other `values`, which are not quantized."""
        return self.pattern.with_values(values)

    def with_numbers(self, numbers: Array) -> Factor:  # type: ignore[override]
        """Return the same levels with other scales, decoded if these are complex."""
        factor = dataclasses.replace(self, scales=numbers)
        return factor.decoded() if backend.is_complex(numbers) else factor

    def on_host(self) -> Self:
        values, scales = backend.host_view(self.values), backend.host_view(self.scales)
        return dataclasses.replace(self, values=values, scales=scales)

    def apply(self, X: Array) -> Array:
        return self.decoded().apply(X)

    @property
    def is_coded(self) -> bool:
        return True

    def suits_bytes(self) -> bool:
        return self.pattern.suits_bytes()  # as a diagonal, whose numbers are few

    def add_to(self, program: Program) -> None:
        if program.stored == "int8" and isinstance(self.pattern, (DenseFactor, SparseFactor)):
            program.add_quantized(self)
        else:
            self.decoded().add_to(program)

    def toarray(self) -> Array:
        return self.decoded().toarray()

    @property
    def locations(self) -> np.ndarray:
        return self.pattern.locations

    @property
    def norm(self) -> float:
        return backend.norm(self.decoded().values)

    def index_nbytes(self, format: str) -> int:
        return self.pattern.index_nbytes(format)

    def value_nbytes(self) -> int:
        """Bytes of codes, of 16-bit scales, and of levels unless they are all integers."""
        levels = 2**self.bits if self.bits < BITS[-1] else 0
        return -(-self.nnz * self.bits // 8) + levels + 2 * (len(self.bounds) - 1)

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"QuantizedFactor({rows}×{columns}, {self.nnz} values of {self.bits} bits)"


def group_bounds(pattern: Factor, group_size: int | None) -> np.ndarray:
    """Return where groups of values that share a scale begin, and where the last one ends.

    The values of a row form ``max(1, round(length / group_size))`` groups, the `i`-th of `n` from
    ``length * i // n`` on. Dense and compressed sparse rows have rows; the values of other
    storages count as one row.

    Parameters
    ----------
    pattern : Factor
        Where the values stand.
    group_size : int or None
        Number of values in a group, about; None for all values of a row.

    Returns
    -------
    ndarray of shape (n_groups + 1,)
        Increasing places in the flattened values.
    """
    lengths, counts = group_counts(pattern, group_size)
    row = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = (np.cumsum(lengths) - lengths)[row] + lengths[row] * number // counts[row]
    return np.append(begins, lengths.sum())


def group_counts(pattern: Factor, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of values, and of groups, of each row that has any."""
    if isinstance(pattern, SparseFactor):
        lengths = np.diff(pattern.indptr)
    elif isinstance(pattern, DenseFactor):
        rows, columns = pattern.shape
        lengths = np.full(rows if columns else 0, columns)
    else:
        lengths = np.asarray([math.prod(pattern.values.shape)])
    lengths = lengths[lengths > 0].astype(np.int64)
    counts = np.ones_like(lengths)
    if group_size is not None:
        counts = np.maximum(1, (2 * lengths + group_size) // (2 * group_size))
    return lengths, counts


def first_groups(pattern: Factor, group_size: int | None) -> np.ndarray:
    """Return the number of the first group of each row, and that of all groups at the end."""
    rows, columns = pattern.shape
    counts = np.zeros(rows, np.int64)
    if isinstance(pattern, SparseFactor):
        has_values = np.diff(pattern.indptr) > 0
    else:
        has_values = np.full(rows, columns > 0)
    counts[has_values] = group_counts(pattern, group_size)[1]
    return np.append(0, np.cumsum(counts))
