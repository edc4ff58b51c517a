"""Base class of factors."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from matfact import backend
from matfact.backend import Array

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Factor(ABC):
    """Factor of a product: stored values and, in subclasses, their positions.

    Parameters
    ----------
    values : array
        The stored values, in the shape of the storage format. They determine the array library,
        device and dtype of the factor. Positions are NumPy integers on the host.
    """

    values: Array

    #: Name of the storage format in saved files.
    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @property
    @abstractmethod
    def T(self) -> Factor:  # noqa: N802
        """The transpose (without conjugation)."""

    @abstractmethod
    def apply(self, X: Array) -> Array:
        """Return the product with `X`, of shape (columns, batch) and a compute dtype."""

    @abstractmethod
    def add_to(self, program: Program) -> None:
        """Append the factor to a program for the kernels (NumPy values only)."""

    @property
    def is_coded(self) -> bool:
        """Whether the matrix is stored as codes of a few bits."""
        return False

    def suits_bytes(self) -> bool:
        """Whether it can be a step of a program that stores bytes, for real numbers."""
        return False

    @abstractmethod
    def toarray(self) -> Array:
        """Return the matrix as a dense array."""

    @property
    def locations(self) -> np.ndarray:
        """Position of each value in the flattened matrix, in the order of the values."""
        numbers = np.arange(1.0, self.nnz + 1)
        flat = self.with_values(numbers.reshape(self.values.shape)).toarray().reshape(-1)
        found = np.flatnonzero(flat) if self.nnz else np.zeros(0, dtype=np.int64)
        locations = np.empty(self.nnz, dtype=np.int64)
        locations[flat[found].astype(np.int64) - 1] = found
        return locations

    @property
    def numbers(self) -> Array:
        """The stored array that carries the dtype of the factor."""
        return self.values

    @property
    def dtype(self) -> Any:
        """Dtype of the factor."""
        return self.numbers.dtype

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return math.prod(self.values.shape)

    @property
    def flops(self) -> int:
        """Floating-point operations per sample: one multiplication and one addition per value."""
        return 2 * self.nnz

    def index_nbytes(self, format: str) -> int:
        """Bytes of the positions in storage `format` (0 if implied)."""
        return 0

    def value_nbytes(self) -> int:
        """Bytes of the stored values."""
        return self.nnz * dtype_nbytes(self.dtype)

    def with_values(self, values: Array) -> Self:
        """Return a factor with the same positions and other `values`."""
        return dataclasses.replace(self, values=values)

    def with_numbers(self, numbers: Array) -> Self:
        """Return a factor with other `numbers`, the array that products are scaled by."""
        return self.with_values(numbers)

    def decoded(self) -> Factor:
        """Return the factor with floating point values: itself, if they are not quantized."""
        return self

    def on_host(self) -> Self:
        """Return the factor with NumPy views of what it stores."""
        return self.with_values(backend.host_view(self.values))

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return backend.norm(self.values)

    def scaled(self, c: float) -> Self:
        """Return `c` times the factor."""
        return self.with_numbers(self.numbers * c)

    def conj(self) -> Self:
        """Return the complex conjugate (itself when real)."""
        xp = backend.namespace(self.numbers)
        if not xp.isdtype(self.dtype, "complex floating"):
            return self
        return self.with_numbers(xp.conj(self.numbers))

    def astype(self, dtype: Any) -> Self:
        """Return the factor with its values in another dtype."""
        xp = backend.namespace(self.numbers)
        return self.with_numbers(xp.astype(self.numbers, dtype))

    def __getstate__(self) -> dict[str, Any]:
        """Drop caches for applying the factor."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{type(self).__name__}({rows}×{columns}, {self.nnz} values)"


def dtype_nbytes(dtype: Any) -> int:
    """Bytes of one entry of an array library's `dtype`."""
    name = str(dtype).rpartition(".")[2]
    return 2 if name == "bfloat16" else np.dtype(name).itemsize
