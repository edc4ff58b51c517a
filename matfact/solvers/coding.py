"""Encoding of unseen rows with the factors of a product."""

from __future__ import annotations

import numpy as np

from matfact import backend, kernels, metrics
from matfact.backend import Array
from matfact.operators import FactorProduct
from matfact.solvers.admm import DAMPING

#: Penalties of the ADMM steps that find a support, relative to the diagonal of the Gram matrix.
PENALTIES = tuple(np.geomspace(0.05, 1.0, 12).tolist())
#: Conjugate gradient steps on the values once the support is found.
REFIT_STEPS = 12


def coding_error(W: Array, product: FactorProduct) -> float:
    """Return the relative error of rows encoded with all factors of a product but the first.

    The first factor is replaced by one for these rows, with as many values per row at the best
    positions. For a single factor this is magnitude pruning.

    Parameters
    ----------
    W : array of shape (n_rows, in_features)
        The rows.
    product : FactorProduct
        Product of shape (out_features, in_features), in the library and on the device of `W`.

    Returns
    -------
    float
        ``‖W − C R‖_F / ‖W‖_F`` with the code `C` and the product `R` of the other factors.
    """
    factors = list(product.factors)
    while factors and not factors[0].nnz:  # a selection of rows
        factors.pop(0)
    if not factors:
        return metrics.relative_error(W, backend.namespace(W).zeros_like(W))
    first, *others = factors
    n_values = max(1, round(first.nnz * W.shape[0] / product.shape[0]))
    if not others:
        return metrics.magnitude_error(W, n_values)
    W, atoms = (_scaled(array) for array in (W, FactorProduct(others).toarray()))
    norm = backend.norm(W)
    if n_values >= W.shape[0] * atoms.shape[0]:
        lost = _projection_residual(W, atoms)
    else:
        lost = _sparse_residual(W, atoms, n_values)
    return min(1.0, backend.norm(lost) / norm) if norm else 0.0


def _scaled(array: Array) -> Array:
    """Return an array in double precision, divided by about its largest magnitude."""
    array = backend.wide(array)
    return array * (1 / backend.unit(array))


def _projection_residual(W: Array, atoms: Array) -> Array:
    """Return `W` minus its projection on the span of the rows `atoms`."""
    xp = backend.namespace(W)
    _, sizes, basis = xp.linalg.svd(atoms, full_matrices=False)
    rounding = float(xp.finfo(sizes.dtype).eps) * max(atoms.shape) * backend.max_abs(sizes)
    basis = basis[: int(backend.count_nonzero(sizes > rounding)), :]
    return W - (W @ _adjoint(basis)) @ basis


def _sparse_residual(W: Array, atoms: Array, n_values: int) -> Array:
    """Return `W` minus its approximation by `n_values` coefficients of the `atoms`."""
    xp = backend.namespace(W)
    gram, cross = atoms @ _adjoint(atoms), W @ _adjoint(atoms)
    diagonal = xp.abs(xp.linalg.diagonal(gram))
    diagonal = xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal))
    norms = xp.sqrt(diagonal)
    code = dual = xp.zeros_like(cross)
    for penalty in PENALTIES:
        weights = xp.astype(penalty * diagonal, cross.dtype)
        damped = backend.add_diagonal(gram, weights * (1 + DAMPING / penalty))
        solution = _adjoint(xp.linalg.solve(damped, _adjoint(cross + weights * (code - dual))))
        total = solution + dual
        support = kernels.top_k_mask(total * xp.astype(norms, total.dtype), n_values)
        code = backend.restricted(total, support)
        dual = total - code
    return _refit(W - code @ atoms, atoms, support)


def _refit(residual: Array, atoms: Array, support: Array) -> Array:
    """Return the residual after conjugate gradient steps on the coefficients on a support."""

    def gradient(residual: Array) -> Array:
        return backend.zeroed(residual @ _adjoint(atoms), support)

    slope = direction = gradient(residual)
    energy = backend.norm(slope) ** 2
    for _ in range(REFIT_STEPS):
        step = direction @ atoms
        curvature = backend.norm(step) ** 2
        if not energy or not curvature:
            break
        residual = residual - (energy / curvature) * step
        slope, previous = gradient(residual), energy
        energy = backend.norm(slope) ** 2
        direction = slope + (energy / previous) * direction
    return residual


def _adjoint(array: Array) -> Array:
    xp = backend.namespace(array)
    transposed = xp.matrix_transpose(array)
    return xp.conj(transposed) if backend.is_complex(array) else transposed
