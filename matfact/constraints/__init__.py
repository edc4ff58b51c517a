"""Sets of matrices with a projection."""

from matfact.constraints._base import Constraint
from matfact.constraints._rank import LowRank
from matfact.constraints._registry import CONSTRAINTS, get_constraint, resolve_constraint
from matfact.constraints._shared import Circulant, Hankel, Toeplitz
from matfact.constraints._sparsity import (
    BlockSparsity,
    ColumnSparsity,
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
    "Diagonal",
    "FixedSupport",
    "GlobalSparsity",
    "Hankel",
    "LowRank",
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
