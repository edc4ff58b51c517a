"""Transposes of constraint sets."""

from __future__ import annotations

import dataclasses

from matfact import backend
from matfact.backend import Array
from matfact.constraints._base import Constraint
from matfact.constraints._sparsity import ColumnSparsity, GlobalSparsity, RowSparsity


@dataclasses.dataclass(frozen=True)
class _Transposed(Constraint):
    """Matrices whose transpose is in `constraint`."""

    constraint: Constraint

    def project(self, array: Array) -> Array:
        transpose = backend.namespace(array).matrix_transpose
        return transpose(self.constraint.project(backend.contiguous(transpose(array))))

    def support(self, array: Array) -> Array:
        transpose = backend.namespace(array).matrix_transpose
        support = self.constraint.support(backend.contiguous(transpose(array)))
        return backend.contiguous(transpose(support))

    def nnz(self, shape: tuple[int, int]) -> int:
        return self.constraint.nnz((shape[1], shape[0]))


def transposed(constraint: Constraint) -> Constraint:
    """Return the set of matrices whose transpose is in `constraint`.

    Examples
    --------
    >>> transposed(RowSparsity(3))
    ColumnSparsity(k=3)
    """
    match constraint:
        case GlobalSparsity():
            return constraint
        case RowSparsity(k=k):
            return ColumnSparsity(k)
        case ColumnSparsity(k=k):
            return RowSparsity(k)
        case _Transposed(constraint=inner):
            return inner
    return _Transposed(constraint)
