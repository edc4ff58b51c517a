"""Sets that limit where nonzeros may be."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from matfact import backend
from matfact._checks import check_positive_int
from matfact.backend import Array
from matfact.constraints._base import Constraint


class Support(Constraint):
    """Matrices with any values on a fixed support."""

    @abstractmethod
    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the support of a matrix of `shape` as a boolean NumPy array."""

    def support(self, array: Array) -> Array:
        return backend.like(self.mask(tuple(array.shape)), array)

    def project(self, array: Array) -> Array:
        return backend.restricted(array, self.support(array))

    def nnz(self, shape: tuple[int, int]) -> int:
        return int(np.count_nonzero(self.mask(shape)))


@dataclasses.dataclass(frozen=True, eq=False)
class FixedSupport(Support):
    """Matrices that are zero where `support_mask` is false.

    Parameters
    ----------
    support_mask : array-like of bool, 2-D
        The support.
    """

    support_mask: Any

    def __post_init__(self) -> None:
        mask = self.support_mask
        mask = backend.to_numpy(mask) if backend.is_array(mask) else np.asarray(mask)
        if mask.ndim != 2:
            raise ValueError(f"support_mask must be 2-D, got {mask.ndim}-D.")
        if not (mask != 0).any():
            raise ValueError("support_mask must be true somewhere, got no such entry.")
        object.__setattr__(self, "support_mask", mask != 0)

    @classmethod
    def random(
        cls, shape: tuple[int, int], k: int, random_state: int | np.random.RandomState | None = None
    ) -> FixedSupport:
        """Return a random support of `k` positions, for example to share one mask between layers.

        Parameters
        ----------
        shape : tuple of int
            Shape of the factor.
        k : int
            Number of positions, drawn without replacement.
        random_state : int, RandomState or None, default=None
            Seed of the draw.
        """
        check_positive_int("k", k)
        size = shape[0] * shape[1]
        if k > size:
            raise ValueError(f"k must be at most {size} for shape {shape}, got {k}.")
        mask = np.zeros(size, dtype=bool)
        mask[check_random_state(random_state).choice(size, k, replace=False)] = True
        return cls(mask.reshape(shape))

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        if self.support_mask.shape != shape:
            raise ValueError(
                f"support_mask must have the shape of the factor, {shape}, got "
                f"{self.support_mask.shape}."
            )
        return self.support_mask

    def __repr__(self) -> str:
        rows, columns = self.support_mask.shape
        return f"FixedSupport({rows}×{columns}, {np.count_nonzero(self.support_mask)} entries)"


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Support):
    """Block-diagonal matrices with `n_blocks` blocks of nearly equal size.

    Parameters
    ----------
    n_blocks : int
        Number of blocks, at most the shorter side.
    """

    n_blocks: int

    def __post_init__(self) -> None:
        check_positive_int("n_blocks", self.n_blocks)

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        if self.n_blocks > min(shape):
            raise ValueError(
                f"n_blocks must be at most {min(shape)} for shape {shape}, got {self.n_blocks}."
            )
        block_of_row, block_of_column = (np.arange(n) * self.n_blocks // n for n in shape)
        return block_of_row[:, None] == block_of_column


@dataclasses.dataclass(frozen=True)
class Triangular(Support):
    """Triangular matrices.

    Parameters
    ----------
    upper : bool, default=False
        Whether the matrices are upper triangular instead of lower triangular.
    """

    upper: bool = False

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        return np.triu(np.ones(shape, bool)) if self.upper else np.tri(*shape, dtype=bool)


@dataclasses.dataclass(frozen=True)
class Diagonal(Support):
    """Diagonal matrices."""

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        return np.eye(*shape, dtype=bool)
