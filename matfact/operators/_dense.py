"""Dense factor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DenseFactor(Factor):
    """Dense matrix; `values` has its shape."""

    kind: ClassVar[str] = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.values.shape[0]), int(self.values.shape[1]))

    @property
    def T(self) -> DenseFactor:  # noqa: N802
        return DenseFactor(backend.namespace(self.values).matrix_transpose(self.values))

    def apply(self, X: Array) -> Array:
        values = backend.compute_array(self.values)
        return backend.namespace(values).matmul(values, X)

    def add_to(self, program: Program) -> None:
        rows, columns = self.shape
        whole = np.asarray([[0, rows, 0, columns]])
        program.add_blocks(np.ravel(self.values), whole, rows)

    def toarray(self) -> Array:
        return self.values
