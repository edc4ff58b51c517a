"""What a constraint set is: something arrays can be projected onto."""

from __future__ import annotations

from abc import ABC, abstractmethod

from matfact.backend import Array


class Constraint(ABC):
    """A set of matrices with a projection. Subclasses are small frozen dataclasses."""

    @abstractmethod
    def project(self, array: Array) -> Array:
        """Return the point of the set nearest to `array` (Frobenius norm)."""

    @abstractmethod
    def nnz(self, shape: tuple[int, int]) -> int:
        """Return the most values a matrix of `shape` in the set can store.

        Raises
        ------
        ValueError
            If no matrix of `shape` can satisfy the constraint.
        """

    def support(self, array: Array) -> Array:
        """Return the boolean mask of entries the projection of `array` keeps."""
        return self.project(array) != 0
