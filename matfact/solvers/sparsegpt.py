"""Pruning with error feedback: SparseGPT."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.constraints import (
    ColumnSparsity,
    Constraint,
    GlobalSparsity,
    NMSparsity,
    RowSparsity,
    transposed,
)
from matfact.solvers.error_feedback import Settle, feedback, live_inputs, sweep
from matfact.solvers.layerwise import input_norms

#: Inputs whose entries are chosen together, as published.
PANEL = 128


def sparsegpt(
    W: Array, gram: Array, constraint: Constraint, *, damping: float
) -> tuple[Array, float]:
    """Lower ``‖X (W − Ŵ)ᵀ‖_F²`` over `Ŵ` in a set of sparse matrices.

    Source: Frantar & Alistarh (2023). Entries are chosen for 128 inputs at a time, once errors
    before them are made up for, and for each group of an N:M sparsity. A set that is none of those
    named there is chosen by weights and norms of inputs before the sweep begins.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision.
    constraint : Constraint
        Set of `Ŵ`, a sparsity or a support.
    damping : float
        What is added to the diagonal of `gram`, relative to its mean.

    Returns
    -------
    W : array of shape (rows, columns)
        `Ŵ`.
    objective : float
        Squared error of the outputs, damping included, over the mean diagonal.

    References
    ----------
    - E. Frantar, D. Alistarh, "SparseGPT: Massive language models can be accurately pruned in
      one-shot", ICML 2023.
    """
    xp = backend.namespace(W)
    found = feedback(gram, damping).astype(W.dtype)
    roots = xp.sqrt(found.weights)
    live = xp.astype(live_inputs(gram), W.dtype)
    T = backend.contiguous(xp.matrix_transpose(W * live))
    width = constraint.m if isinstance(constraint, NMSparsity) else PANEL
    bounds = np.append(np.arange(0, T.shape[0], width), T.shape[0]).tolist()
    chosen = None if _is_local(constraint) else _chosen(T, gram, constraint)

    def begin(panel: slice, targets: Array) -> Settle:
        if chosen is None:
            part = _part(constraint, panel, T.shape[0])
            support = _support(part, targets * roots[panel, None])
        else:
            support = chosen[panel, :]
        return lambda place, target: xp.where(support[place, :], target, 0.0 * target)

    result, objective = sweep(T, found, bounds, begin)
    return xp.matrix_transpose(result) / live, objective


def _is_local(constraint: Constraint) -> bool:
    """Whether entries can be chosen for a few inputs at a time."""
    return isinstance(constraint, (GlobalSparsity, RowSparsity, ColumnSparsity, NMSparsity))


def _part(constraint: Constraint, panel: slice, columns: int) -> Constraint | None:
    """Return the set of the matrices of a few inputs, None for that of zero alone."""
    if isinstance(constraint, (GlobalSparsity, RowSparsity)):
        k = constraint.k * panel.stop // columns - constraint.k * panel.start // columns
        return type(constraint)(k) if k else None
    return constraint


def _support(part: Constraint | None, scores: Array) -> Array:
    xp = backend.namespace(scores)
    if part is None:
        return xp.zeros_like(scores, dtype=xp.bool)
    return transposed(part).support(scores)


def _chosen(T: Array, gram: Array, constraint: Constraint) -> Array:
    xp = backend.namespace(T)
    norms = xp.astype(input_norms(gram), T.dtype)
    return transposed(constraint).support(T * norms[:, None])
