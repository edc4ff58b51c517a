"""Base class of constraint sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from matfact.backend import Array


class Constraint(ABC):
    """Set of matrices with a projection. Subclasses are small frozen dataclasses."""

    #: Whether the set is closed under multiplication by a positive number.
    is_cone: ClassVar[bool] = True
    #: Whether the set is closed under positive scaling of rows and columns, so that a solver may
    #: precondition (true for sparsity, supports, signs and rank; false for shared values).
    is_scale_free: ClassVar[bool] = True

    @abstractmethod
    def project(self, array: Array) -> Array:
        """Return the nearest point of the set to `array`, in the Frobenius norm."""

    @abstractmethod
    def nnz(self, shape: tuple[int, int]) -> int:
        """Return the maximum number of stored values of a matrix of `shape` in the set.

        Raises
        ------
        ValueError
            If no matrix of `shape` can satisfy the constraint.
        """

    def support(self, array: Array) -> Array:
        """Return the boolean mask of the entries kept by the projection of `array`."""
        return self.project(array) != 0


def check_square(constraint: Constraint, shape: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless `shape` is square, as `constraint` needs."""
    if shape[0] != shape[1]:
        raise ValueError(f"{constraint} needs a square matrix, got shape {shape}.")
