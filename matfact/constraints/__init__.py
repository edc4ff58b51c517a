"""Constraint sets: sets of matrices with a projection."""

from matfact.constraints._base import Constraint
from matfact.constraints._rank import MaxRank
from matfact.constraints._registry import CONSTRAINTS, get_constraint, resolve_constraint
from matfact.constraints._shared import Circulant, Hankel, Toeplitz
from matfact.constraints._sparsity import (
    BlockSparsity,
    ColumnSparsity,
    CountedSparsity,
    GlobalSparsity,
    NMSparsity,
    RowColumnSparsity,
    RowSparsity,
    Sparsity,
)
from matfact.constraints._support import (
    BlockDiagonal,
    Diagonal,
    FixedSupport,
    Support,
    Triangular,
)
from matfact.constraints._transposed import transposed
from matfact.constraints._values import NonNegative, UnitNormColumns

__all__ = [
    "CONSTRAINTS",
    "BlockDiagonal",
    "BlockSparsity",
    "Circulant",
    "ColumnSparsity",
    "Constraint",
    "CountedSparsity",
    "Diagonal",
    "FixedSupport",
    "GlobalSparsity",
    "Hankel",
    "MaxRank",
    "NMSparsity",
    "NonNegative",
    "RowColumnSparsity",
    "RowSparsity",
    "Sparsity",
    "Support",
    "Toeplitz",
    "Triangular",
    "UnitNormColumns",
    "get_constraint",
    "resolve_constraint",
    "transposed",
]
