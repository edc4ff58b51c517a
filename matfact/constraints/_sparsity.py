"""Sets defined by how many entries may be nonzero."""

from __future__ import annotations

import dataclasses

from matfact import backend, kernels
from matfact.backend import Array
from matfact.constraints._base import Constraint


@dataclasses.dataclass(frozen=True)
class GlobalSparsity(Constraint):
    """At most `k` nonzeros anywhere.

    Parameters
    ----------
    k : int
        Number of nonzeros, at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")

    def project(self, array: Array) -> Array:
        xp = backend.namespace(array)
        return xp.where(self.support(array), array, xp.zeros_like(array))

    def support(self, array: Array) -> Array:
        return kernels.top_k_mask(backend.namespace(array).abs(array), self.k)

    def nnz(self, shape: tuple[int, int]) -> int:
        return min(self.k, shape[0] * shape[1])
