"""Sets of matrices with a projection."""

from matfact.constraints._base import Constraint
from matfact.constraints._rank import LowRank
from matfact.constraints._registry import CONSTRAINTS, get_constraint
from matfact.constraints._shared import Circulant, Hankel, Toeplitz
from matfact.constraints._sparsity import (
    ColumnSparsity,
    GlobalSparsity,
    NMSparsity,
    RowColumnSparsity,
    RowSparsity,
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
    "Support",
    "Toeplitz",
    "Triangular",
    "UnitNormColumns",
    "get_constraint",
    "transposed",
]
