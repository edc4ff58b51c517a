"""Errors, stored values and budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from matfact import backend
from matfact.backend import Array

#: Default density (Boža & Macko 2025 report 25 %).
DEFAULT_DENSITY = 0.25


def relative_error(W: Array, W_hat: Array) -> float:
    """Return ``‖W − Ŵ‖_F / ‖W‖_F``, in double precision.

    Parameters
    ----------
    W, W_hat : array of shape (out_features, in_features)
        The matrix and its approximation.

    Returns
    -------
    float
        0 if both are zero, infinity if only `W` is.
    """
    error, total = _norms(W, W_hat)
    if math.isinf(error) or math.isinf(total):
        scale = backend.power_of_two(max(backend.max_abs(W), backend.max_abs(W_hat)))
        error, total = _norms(W, W_hat, scale)
    if error == 0.0:
        return 0.0
    return error / total if total else math.inf


def _norms(W: Array, W_hat: Array, scale: float = 1.0) -> tuple[float, float]:
    """Return ``‖W − Ŵ‖_F`` and ``‖W‖_F``, both divided by `scale`."""
    errors, totals = [], []
    with np.errstate(over="ignore"):
        for slab, slab_hat in _slabs(W, W_hat, scale):
            errors.append(backend.norm(slab - slab_hat))
            totals.append(backend.norm(slab))
    return math.hypot(*errors), math.hypot(*totals)


def _slabs(W: Array, W_hat: Array, scale: float) -> Iterator[tuple[Array, Array]]:
    """Yield slabs of rows of both matrices, divided by `scale`, in double precision."""
    for rows in backend.slabs(W.shape[0]):
        yield backend.wide(W[rows, :]) / scale, backend.wide(W_hat[rows, :]) / scale


def layer_error(W: Array, W_hat: Array, gram: Array) -> float:
    """Return ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for layer inputs `X`, from their Gram matrix.

    Parameters
    ----------
    W, W_hat : array of shape (out_features, in_features)
        The matrix and its approximation.
    gram : array of shape (in_features, in_features)
        ``XᵀX`` in double precision.

    Returns
    -------
    float
        0 if both outputs are zero, infinity if only those of `W` are.

    Notes
    -----
    Because Gram matrices hold squares, errors below about 1e-8 are rounding.
    """
    scale = max(backend.max_abs(W), backend.max_abs(W_hat))
    if scale == 0.0:
        return 0.0
    total = error = 0.0
    for slab, slab_hat in _slabs(W, W_hat, scale):
        total += output_energy(slab, gram)
        error += output_energy(slab - slab_hat, gram)
    if total == 0.0:
        return math.inf if error else 0.0
    return math.sqrt(error / total)


def output_energy(W: Array, gram: Array) -> float:
    """Return ``‖XWᵀ‖_F²`` for layer inputs `X`, from their Gram matrix.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        The matrix.
    gram : array of shape (in_features, in_features)
        ``XᵀX`` in double precision.
    """
    xp = backend.namespace(W)
    energy = 0.0
    for rows in backend.slabs(W.shape[0]):
        slab = backend.wide(W[rows, :])
        product = xp.matmul(slab, xp.astype(gram, slab.dtype, copy=False))
        product *= xp.conj(slab) if backend.is_complex(slab) else slab
        energy += complex(xp.sum(product)).real
    # The rounding of a singular Gram matrix could give a negative value.
    return max(0.0, energy)


def least_chain(shape: tuple[int, int], n_factors: int) -> int:
    """Return the minimum number of values of sparse factors, square except for one.

    Two factors can represent single entries of the matrix. With more, each factor needs one value
    per row or column, like an identity.
    """
    if n_factors <= 2:
        return n_factors
    # At most the size of the matrix, which is smaller for tiny matrices.
    return max(n_factors, min((n_factors - 1) * min(shape) + max(shape), shape[0] * shape[1]))


def magnitude_error(W: Array, nnz: int) -> float:
    """Return the relative error of keeping the `nnz` largest entries of `W`.

    This is the smallest error of any matrix with `nnz` nonzeros, and the denominator of
    `normalized_error`.
    """
    xp, W = backend.namespace(W), backend.compute_array(W)
    magnitudes = xp.reshape(xp.abs(W), (-1,))
    total, n_lost = backend.norm(magnitudes), math.prod(W.shape) - nnz
    if n_lost <= 0 or total == 0.0:
        return 0.0
    return backend.norm(backend.smallest(magnitudes, n_lost)) / total


def normalized_error(W: Array, error: float, nnz: int) -> float:
    """Return `error` divided by that of magnitude pruning with `nnz` stored values.

    The measure of Boža & Macko 2025, Fig. 3. It is 0 for an exact approximation, and infinity for
    an inexact one where magnitude pruning would be exact.
    """
    if error == 0.0:
        return 0.0
    baseline = magnitude_error(W, nnz)
    return error / baseline if baseline else math.inf


def check_density(density: float | None) -> None:
    """Raise ``ValueError`` unless `density` is None or a number in (0, 1]."""
    if density is None:
        return
    is_number = isinstance(density, (int, float, np.number)) and not isinstance(density, bool)
    if not is_number or not 0.0 < density <= 1.0:
        raise ValueError(f"density must be None or a number in (0, 1], got {density!r}.")


def part_of(total: int, share: float) -> int:
    """Return `share` of `total`, rounded down.

    Unlike ``int(share * total)`` it is robust to binary rounding: 0.29 of 100 is 29.
    """
    count = math.floor(round(share * total, 9))
    return count - (total > 0 and count / total > share)


class UnsuitableMatrix(ValueError):  # noqa: N818 (the name says what is wrong)
    """A matrix is not suitable for a factorizer: complex or not finite."""


class DensityTooSmall(UnsuitableMatrix):
    """A density is too small for the structure of a factorization."""


def stored_value_budget(density: float | None, shape: tuple[int, int], minimum: int = 1) -> int:
    """Return the number of values that may be stored for a matrix of `shape`.

    Parameters
    ----------
    density : float or None
        Stored values ÷ entries of the matrix, in (0, 1]. None means the default density, raised if
        needed to `minimum` values.
    shape : tuple of int
        Shape of the matrix.
    minimum : int
        Minimum number of values of the structure for this shape.

    Raises
    ------
    ValueError
        If `density` is outside (0, 1].
    DensityTooSmall
        If it allows fewer than `minimum` values.
    """
    check_density(density)
    size = shape[0] * shape[1]
    share = DEFAULT_DENSITY if density is None else density
    budget = part_of(size, share)
    if budget >= minimum:
        return budget
    if density is None:
        return minimum
    raise DensityTooSmall(
        f"density={density} allows {budget} stored values for a {shape[0]}×{shape[1]} matrix, "
        f"but this structure needs at least {minimum} (density ≥ {minimum / size:.4g})."
    )
