"""Projection onto Monarch matrices: products of two factors, with low-rank blocks."""

from __future__ import annotations

import math

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.solvers._callback import Callback
from matfact.solvers.chains import Chain
from matfact.solvers.leading import adjoint, improved_range, leading_range
from matfact.solvers.svd import whitening_root


def monarch(
    W: Array, chain: Chain, *, moment: Array = None, callback: Callback | None = None
) -> list[Array]:
    """Return the two factors of `chain` with the product nearest to `W`.

    Rows of the product with the same last digit and columns with the same first digit form
    independent blocks of rank at most ``r_1``. The best approximation is the truncated singular
    value decomposition of each (Dao et al. 2022, "Monarch: expressive structured matrices for
    efficient and accurate training", Section 3.3 and Appendix D, for rank one and square matrices).

    Parameters
    ----------
    W : array of shape ``chain.shape``
        Finite matrix, real or complex.
    chain : Chain
        Two factors.
    moment : array of shape (columns, columns), optional
        Average of ``x xᵀ`` over the inputs of a real `W`, in double precision. With it, slices keep
        the directions in which their outputs have most energy, like
        `matfact.solvers.svd.whitened_svd` for the whole matrix.
    callback : Callback, optional
        Called once, with the squared error.

    Returns
    -------
    values : list of array of shape (a, d, b, c)
        Values of the factors.
    """
    xp = backend.namespace(W)
    (height, left), (right, width), (rank,) = (
        chain.row_radices,
        chain.column_radices,
        chain.ranks,
    )
    slices = _slices(W, chain)
    targets = slices if moment is None else _outputs(slices, moment)
    U = leading_range(targets, rank)
    if rank > 1:
        U = improved_range(targets, U)
    U = xp.astype(U, W.dtype, copy=False)
    Vh = xp.matmul(adjoint(U), slices)
    if callback is not None:  # U is orthonormal
        callback(1, max(0.0, backend.norm(W) ** 2 - backend.norm(Vh) ** 2))
    U = xp.reshape(xp.permute_dims(U, (1, 2, 0, 3)), (1, left, height, right * rank))
    Vh = xp.reshape(xp.permute_dims(Vh, (0, 2, 1, 3)), (right, 1, rank * left, width))
    return [U, Vh]


def monarch_loss(W: Array, chain: Chain, *, n_slices: int | None = None) -> float:
    """Return the squared error of `monarch`, to about 1e-13 of ``‖W‖²``.

    With `n_slices` it is estimated from at most that many slices.
    """
    xp = backend.namespace(W)
    slices = _slices(W, chain)
    right, left, height, width = slices.shape
    n_all, chosen = right * left, slices
    if n_slices is not None and n_slices < n_all:
        places = np.linspace(0, n_all - 1, n_slices).astype(int)
        chosen = xp.stack([slices[int(i // left), int(i % left), :, :] for i in places])
    chosen = backend.wide(chosen)
    if height > width:
        chosen = xp.matrix_transpose(chosen)
    # Eigenvalues of Gram matrices, ascending, take half the time of singular values.
    energies = xp.linalg.eigvalsh(xp.matmul(chosen, adjoint(chosen)))
    lost = float(xp.sum(energies[..., : energies.shape[-1] - chain.ranks[0]]))
    return max(0.0, lost * n_all / math.prod(chosen.shape[:-2]))


def _slices(W: Array, chain: Chain) -> Array:
    """Cut `W` into its blocks, of shape (first column digit, last row digit, rows, columns)."""
    xp = backend.namespace(W)
    cut = xp.reshape(W, (*chain.row_radices, *chain.column_radices))
    return xp.permute_dims(cut, (2, 1, 0, 3))


def _outputs(slices: Array, moment: Array) -> Array:
    """Return the slices times roots of the second moments of their inputs."""
    xp = backend.namespace(slices)
    right, width = slices.shape[0], slices.shape[3]
    spans = [slice(i * width, (i + 1) * width) for i in range(right)]
    roots = xp.stack([whitening_root(moment[span, span]) for span in spans])
    return xp.matmul(backend.wide(slices), roots[:, None, :, :])
