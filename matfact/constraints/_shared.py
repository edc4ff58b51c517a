"""Sets of matrices with shared values: Toeplitz, Hankel and circulant."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.constraints._base import Constraint, check_square


class _SharedValues(Constraint):
    """Matrices with equal entries in each group; the projection takes the mean of each group."""

    is_scale_free: ClassVar[bool] = False

    @abstractmethod
    def groups(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the group of every entry, numbered from 0."""

    @abstractmethod
    def totals(self, array: Array) -> Array:
        """Return the sum of every group."""

    def values(self, array: Array) -> Array:
        """Return the mean of every group."""
        xp = backend.namespace(array)
        sizes = np.bincount(self.groups(tuple(array.shape)).ravel())
        totals = self.totals(array)
        return totals / xp.astype(backend.like(sizes, array), totals.dtype)

    def project(self, array: Array) -> Array:
        xp = backend.namespace(array)
        groups = self.groups(tuple(array.shape)).ravel()
        values = xp.take(self.values(array), backend.like(groups, array), axis=0)
        return xp.reshape(values, array.shape)

    def nnz(self, shape: tuple[int, int]) -> int:
        return int(self.groups(shape).max()) + 1


@dataclasses.dataclass(frozen=True)
class Hankel(_SharedValues):
    """Matrices that are constant along every antidiagonal."""

    def groups(self, shape: tuple[int, int]) -> np.ndarray:
        return np.add.outer(np.arange(shape[0]), np.arange(shape[1]))

    def totals(self, array: Array) -> Array:
        xp = backend.namespace(array)
        rows, columns = array.shape
        # Reshaping to rows one entry shorter turns antidiagonals into columns.
        zeros = xp.zeros((rows, rows), dtype=array.dtype, device=backend.device(array))
        flat = xp.reshape(xp.concat([array, zeros], axis=1), (-1,))
        width = rows + columns - 1
        return xp.sum(xp.reshape(flat[: rows * width], (rows, width)), axis=0)


@dataclasses.dataclass(frozen=True)
class Toeplitz(_SharedValues):
    """Matrices that are constant along every diagonal."""

    def groups(self, shape: tuple[int, int]) -> np.ndarray:
        return Hankel().groups(shape)[::-1]

    def totals(self, array: Array) -> Array:
        return Hankel().totals(backend.namespace(array).flip(array, axis=0))


@dataclasses.dataclass(frozen=True)
class Circulant(_SharedValues):
    """Square matrices in which every row is the row above, rotated right by one."""

    def groups(self, shape: tuple[int, int]) -> np.ndarray:
        check_square(self, shape)
        return np.subtract.outer(np.arange(shape[0]), np.arange(shape[1])) % shape[0]

    def totals(self, array: Array) -> Array:
        xp = backend.namespace(array)
        n = array.shape[0]
        sums = xp.flip(Toeplitz().totals(array))  # diagonals i − j = 1 − n, …, n − 1
        head = xp.zeros(1, dtype=array.dtype, device=backend.device(array))
        return sums[n - 1 :] + xp.concat([head, sums[: n - 1]])
