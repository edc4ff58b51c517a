"""Sets of matrices of bounded rank."""

from __future__ import annotations

import dataclasses

from matfact import backend
from matfact._checks import check_positive_int
from matfact.backend import Array
from matfact.constraints._base import Constraint


@dataclasses.dataclass(frozen=True)
class MaxRank(Constraint):
    """Matrices of rank at most `rank`.

    Parameters
    ----------
    rank : int
        Maximum rank, at least 1.
    """

    rank: int

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)

    def factors(self, array: Array) -> tuple[Array, Array]:
        """Return two factors of the projection (Eckart–Young)."""
        xp = backend.namespace(array)
        U, S, Vh = xp.linalg.svd(array, full_matrices=False)
        root = xp.astype(xp.sqrt(S[: self.rank]), array.dtype)
        return U[:, : self.rank] * root, root[:, None] * Vh[: self.rank, :]

    def project(self, array: Array) -> Array:
        left, right = self.factors(array)
        return backend.namespace(array).matmul(left, right)

    def nnz(self, shape: tuple[int, int]) -> int:
        return min(shape[0] * shape[1], self.rank * (shape[0] + shape[1]))
