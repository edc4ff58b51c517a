"""Constraints by name. To add one, write a class and a line here."""

from __future__ import annotations

from typing import Any

from matfact.constraints._base import Constraint
from matfact.constraints._rank import MaxRank
from matfact.constraints._shared import Circulant, Hankel, Toeplitz
from matfact.constraints._sparsity import (
    BlockSparsity,
    ColumnSparsity,
    GlobalSparsity,
    NMSparsity,
    RowColumnSparsity,
    RowSparsity,
)
from matfact.constraints._support import BlockDiagonal, Diagonal, FixedSupport, Triangular
from matfact.constraints._values import NonNegative, UnitNormColumns

CONSTRAINTS: dict[str, type[Constraint]] = {
    "block_diagonal": BlockDiagonal,
    "block_sparsity": BlockSparsity,
    "circulant": Circulant,
    "column_sparsity": ColumnSparsity,
    "diagonal": Diagonal,
    "fixed_support": FixedSupport,
    "global_sparsity": GlobalSparsity,
    "hankel": Hankel,
    "max_rank": MaxRank,
    "n_m_sparsity": NMSparsity,
    "non_negative": NonNegative,
    "row_column_sparsity": RowColumnSparsity,
    "row_sparsity": RowSparsity,
    "toeplitz": Toeplitz,
    "triangular": Triangular,
    "unit_norm_columns": UnitNormColumns,
}
"""Classes of constraints by name."""


def get_constraint(name: str, **parameters: Any) -> Constraint:
    """Return the constraint called `name` with the given parameters.

    Examples
    --------
    >>> get_constraint("global_sparsity", k=8)
    GlobalSparsity(k=8)
    """
    if name not in CONSTRAINTS:
        raise ValueError(f"name must be one of {sorted(CONSTRAINTS)}, got {name!r}.")
    return CONSTRAINTS[name](**parameters)


def resolve_constraint(constraint: Constraint | str, label: str) -> Constraint:
    """Return `constraint`, looked up by name if it is a string.

    Raises
    ------
    ValueError
        If it is neither a constraint nor the name of one without parameters. The message names
        `label`.
    """
    if isinstance(constraint, str):
        try:
            return get_constraint(constraint)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{label}={constraint!r}: {error}") from None
    if not isinstance(constraint, Constraint):
        raise ValueError(
            f"{label} must be a Constraint or one of {sorted(CONSTRAINTS)}, got {constraint!r}."
        )
    return constraint
