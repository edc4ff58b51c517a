"""Sets of matrices with a projection."""

from matfact.constraints._base import Constraint
from matfact.constraints._sparsity import GlobalSparsity

__all__ = ["Constraint", "GlobalSparsity"]
