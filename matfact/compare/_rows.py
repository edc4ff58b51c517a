"""Rows of a comparison, and their means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """Fit of one method to one matrix.

    Attributes
    ----------
    matrix : str
        Name of the matrix.
    rows, columns : int
        Its shape.
    size : str
        Its shape as a label: one number for a square, ``rows×columns`` otherwise.
    method : str
        Name of the method.
    requested_density : float or None
        Requested density; None if the estimator has no such parameter.
    requested_bits : float or None
        Requested bits a weight; None in a comparison by density.
    value_bits : int or None
        Bits of a stored value, where they were chosen.
    status : {"ok", "failed"}
        Whether the fit succeeded. If it failed, all later fields except `message` are None.
    density : float or None
        Stored values ÷ entries of the matrix.
    nnz : int or None
        Stored values.
    relative_error : float or None
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_error : float or None
        Relative error ÷ that of magnitude pruning with as many stored values.
    seconds : float or None
        Wall time of the fit on one thread, without compilation.
    n_iter : int or None
        Iterations run.
    flops_ratio : float or None
        Operations to apply the product ÷ those of the dense matrix.
    nbytes : int or None
        Bytes of values and positions, in CSR where they are scattered.
    bits_per_weight : float or None
        Bits of the file that holds the factors ÷ entries of the matrix.
    message : str
        Why the fit failed, or what it warned about.
    """

    matrix: str
    rows: int
    columns: int
    size: str
    method: str
    requested_density: float | None
    status: str
    density: float | None = None
    nnz: int | None = None
    relative_error: float | None = None
    normalized_error: float | None = None
    seconds: float | None = None
    n_iter: int | None = None
    flops_ratio: float | None = None
    nbytes: int | None = None
    requested_bits: float | None = None
    value_bits: int | None = None
    bits_per_weight: float | None = None
    message: str = ""

    @property
    def budget(self) -> str:
        """What was requested, as a label."""
        return budget(self.requested_bits, self.requested_density)


def budget(bits: float | None, density: float | None) -> str:
    """Return requested bits a weight, or a requested density, as a label."""
    if bits is not None:
        return f"{bits:g} bits"
    return "" if density is None else f"{density:g}"


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """Fits of one method to the matrices of one size.

    Attributes
    ----------
    method, size, requested_density, requested_bits
        As in `ComparisonRow`.
    n_ok, n_failed : int
        Numbers of successful and failed fits.
    mean, std : dict of str to float
        Mean and sample standard deviation (0 for one fit) of every measure in `MEASURES` over
        the successful fits; empty if there are none.
    """

    method: str
    size: str
    requested_density: float | None
    n_ok: int
    n_failed: int
    mean: Mapping[str, float]
    std: Mapping[str, float]
    requested_bits: float | None = None


COLUMNS = tuple(field.name for field in dataclasses.fields(ComparisonRow))
#: Numeric columns that can be averaged.
MEASURES = (
    "density", "nnz", "relative_error", "normalized_error", "seconds", "n_iter", "flops_ratio",
    "nbytes", "bits_per_weight",
)  # fmt: skip
