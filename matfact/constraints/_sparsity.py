"""Sets that limit the number of nonzeros."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Self

from matfact import backend, kernels
from matfact._checks import check_positive_int
from matfact.backend import Array
from matfact.constraints._base import Constraint


class Sparsity(Constraint):
    """Set whose projection keeps entries chosen by magnitude and zeroes the others."""

    def project(self, array: Array) -> Array:
        return backend.restricted(array, self.support(array))

    @abstractmethod
    def support(self, array: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class CountedSparsity(Sparsity):
    """Sparsity with a single level.

    Parameters
    ----------
    k : int
        Level, at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_positive_int("k", self.k)

    def with_share(self, share: float) -> Self:
        """Return the set with the level multiplied by `share`, rounded, at least 1."""
        return dataclasses.replace(self, k=max(1, round(share * self.k)))


@dataclasses.dataclass(frozen=True)
class GlobalSparsity(CountedSparsity):
    """Matrices with at most `k` nonzeros.

    Parameters
    ----------
    k : int
        Number of nonzeros, at least 1.
    """

    def support(self, array: Array) -> Array:
        return kernels.top_k_mask(array, self.k)

    def nnz(self, shape: tuple[int, int]) -> int:
        return min(self.k, shape[0] * shape[1])


@dataclasses.dataclass(frozen=True)
class RowSparsity(CountedSparsity):
    """Matrices with at most `k` nonzeros per row.

    Parameters
    ----------
    k : int
        Number of nonzeros per row, at least 1.
    """

    def support(self, array: Array) -> Array:
        return kernels.top_k_mask(array, self.k, axis=1)

    def nnz(self, shape: tuple[int, int]) -> int:
        return shape[0] * min(self.k, shape[1])


@dataclasses.dataclass(frozen=True)
class ColumnSparsity(CountedSparsity):
    """Matrices with at most `k` nonzeros per column.

    Parameters
    ----------
    k : int
        Number of nonzeros per column, at least 1.
    """

    def support(self, array: Array) -> Array:
        return kernels.top_k_mask(array, self.k, axis=0)

    def nnz(self, shape: tuple[int, int]) -> int:
        return shape[1] * min(self.k, shape[0])


@dataclasses.dataclass(frozen=True)
class RowColumnSparsity(CountedSparsity):
    """Union of the `k` largest entries of every row and of every column.

    ``project`` follows Giffon et al. 2021 (appendix A.4): every row and column keeps at least
    its `k` largest entries. It is idempotent, but does not return the nearest point of a set.

    Parameters
    ----------
    k : int
        Sparsity level, at least 1.
    """

    def support(self, array: Array) -> Array:
        by_column = kernels.top_k_mask(array, self.k, axis=0)
        return by_column | kernels.top_k_mask(array, self.k, axis=1)

    def nnz(self, shape: tuple[int, int]) -> int:
        # The k largest entries of the matrix are also among the k largest of their row and column.
        return min(shape[0] * shape[1], self.k * (shape[0] + shape[1] - 1))


@dataclasses.dataclass(frozen=True)
class NMSparsity(Sparsity):
    """Matrices with at most `n` nonzeros in every `m` consecutive entries of a row (N:M sparsity).

    If `m` does not divide the row length, the last group of a row is shorter.

    Parameters
    ----------
    n : int
        Nonzeros per group, between 1 and `m`.
    m : int
        Length of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_positive_int("n", self.n)
        check_positive_int("m", self.m)
        if self.n > self.m:
            raise ValueError(f"n must be at most m={self.m}, got {self.n}.")

    def support(self, array: Array) -> Array:
        xp = backend.namespace(array)
        rows, columns = array.shape
        whole = columns - columns % self.m
        groups = xp.reshape(array[:, :whole], (rows, whole // self.m, self.m))
        mask = xp.reshape(kernels.top_k_mask(groups, self.n, axis=2), (rows, whole))
        rest = kernels.top_k_mask(array[:, whole:], self.n, axis=1)
        return xp.concat([mask, rest], axis=1)

    def nnz(self, shape: tuple[int, int]) -> int:
        groups, rest = divmod(shape[1], self.m)
        return shape[0] * (groups * self.n + min(self.n, rest))


@dataclasses.dataclass(frozen=True)
class BlockSparsity(CountedSparsity):
    """Matrices with nonzeros in at most `k` blocks of a grid, a pattern that accelerators like.

    Parameters
    ----------
    k : int
        Number of blocks, at least 1.
    block_shape : tuple of int, default=(4, 4)
        Rows and columns of a block. If they do not divide the shape, blocks at the lower and right
        edges are smaller.
    """

    block_shape: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.block_shape) != 2:
            raise ValueError(f"block_shape must be two integers, got {self.block_shape!r}.")
        for side in self.block_shape:
            check_positive_int("block_shape", side)

    def support(self, array: Array) -> Array:
        xp = backend.namespace(array)
        rows, columns = self.block_shape
        grid = [-(-n // side) for n, side in zip(array.shape, self.block_shape, strict=True)]
        padded = xp.abs(array)
        for axis, length in enumerate((grid[0] * rows, grid[1] * columns)):
            missing = list(padded.shape)
            missing[axis] = length - padded.shape[axis]
            zeros = xp.zeros(tuple(missing), dtype=padded.dtype, device=backend.device(array))
            padded = xp.concat([padded, zeros], axis=axis)
        energies = xp.sum(xp.reshape(padded, (grid[0], rows, grid[1], columns)) ** 2, axis=(1, 3))
        mask = xp.repeat(kernels.top_k_mask(energies, self.k), rows, axis=0)
        return xp.repeat(mask, columns, axis=1)[: array.shape[0], : array.shape[1]]

    def nnz(self, shape: tuple[int, int]) -> int:
        return min(shape[0] * shape[1], self.k * self.block_shape[0] * self.block_shape[1])
