"""Sets that limit the values of entries or columns."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from matfact import backend
from matfact.backend import Array
from matfact.constraints._base import Constraint


@dataclasses.dataclass(frozen=True)
class NonNegative(Constraint):
    """Real matrices with entries of at least 0."""

    def project(self, array: Array) -> Array:
        xp = backend.namespace(array)
        zero = xp.zeros_like(array)
        if xp.isdtype(array.dtype, "complex floating"):
            array = xp.astype(xp.real(array), array.dtype)
            return xp.where(xp.real(array) > 0, array, zero)
        return xp.where(array > 0, array, zero)

    def nnz(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]


@dataclasses.dataclass(frozen=True)
class UnitNormColumns(Constraint):
    """Matrices with columns of norm 1. A zero column is projected to the first basis vector."""

    is_cone: ClassVar[bool] = False
    is_scale_free: ClassVar[bool] = False

    def project(self, array: Array) -> Array:
        xp = backend.namespace(array)
        # Dividing by the largest entry first keeps the squares in range.
        largest = xp.max(xp.abs(array), axis=0, keepdims=True)
        is_zero = largest == 0
        array = array / xp.astype(xp.where(is_zero, xp.ones_like(largest), largest), array.dtype)
        first = xp.eye(
            array.shape[0], 1, dtype=array.dtype, device=backend.device(array)
        )  # (rows, 1)
        array = xp.where(is_zero, first, array)
        norms = xp.sqrt(xp.sum(xp.abs(array) ** 2, axis=0, keepdims=True))
        return array / xp.astype(norms, array.dtype)

    def nnz(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]
