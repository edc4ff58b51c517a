"""Exact Optimal Brain Compression: weights removed one at a time, the others making up for each."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from matfact import backend
from matfact.kernels.elimination import remove
from matfact.solvers.error_feedback import damped_factor, live_inputs

#: Weights removed before the inverse Gram matrix is brought up to date.
STEPS = 32


def obs_prune(
    W: np.ndarray, gram: np.ndarray, *, total: int, group: int, floor: int, damping: float
) -> tuple[np.ndarray, float]:
    """Lower ``‖X (W − Ŵ)ᵀ‖_F²`` over sparse matrices `Ŵ` by removing one weight at a time.

    Source: Frantar & Alistarh (2022) ("ExactOBS"). Each row loses the weight that raises its error
    least, the others being least squares of the outputs, until no more may go. Of the removals of
    all rows those that cost most are then taken back until `total` weights are left.

    Parameters
    ----------
    W : ndarray of shape (rows, columns)
        Weights.
    gram : ndarray of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision.
    total : int
        Weights that are left.
    group : int
        Consecutive weights of a row that form a group.
    floor : int
        Weights that are left in each group at least.
    damping : float
        What is added to the diagonal of `gram`, relative to its mean.

    Returns
    -------
    W : ndarray of shape (rows, columns)
        `Ŵ`, in double precision.
    objective : float
        Squared error of the outputs, damping included, over the mean diagonal.

    References
    ----------
    - E. Frantar, D. Alistarh, "Optimal brain compression: A framework for accurate
      post-training quantization and pruning", NeurIPS 2022.
    """
    damped, _ = damped_factor(gram, damping)
    inverse = backend.spd_inverse(damped)
    live = live_inputs(gram)
    W = W * live
    traces = [_trace(row.copy(), inverse, group, floor) for row in W]
    # What a row loses by so many removals never falls, so that the cheapest of all are the first
    # of each row.
    costs = np.concatenate([np.maximum.accumulate(losses) for _, losses in traces])
    rows = np.repeat(np.arange(len(W)), [len(losses) for _, losses in traces])
    cheapest = np.argsort(costs, kind="stable")[: W.size - total]
    counts = np.bincount(rows[cheapest], minlength=len(W))
    pruned, objective = np.zeros(W.shape), 0.0
    for i, (row, (order, _), count) in enumerate(zip(W, traces, counts, strict=True)):
        kept = np.ones(len(row), bool)
        kept[order[:count]] = False
        pruned[i] = _least_squares(row, damped, kept)
        lost = pruned[i] - row
        objective += float(lost @ damped @ lost)
    return pruned / live, objective


def _trace(
    row: np.ndarray, inverse: np.ndarray, group: int, floor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of weights in the order they are removed, and what each costs."""
    places, groups = np.arange(len(row)), np.arange(len(row)) // group
    left = np.bincount(groups)
    most = int(np.maximum(left - floor, 0).sum())
    removed, losses = np.empty(most, np.int64), np.empty(most)
    done = 0
    while done < most:
        updates = np.empty((min(STEPS, most - done), len(places)))
        gone = removed[done : done + len(updates)]
        diagonal = inverse.diagonal().copy()
        remove(
            inverse, row, diagonal, groups[places], left, floor, updates, gone,
            losses[done : done + len(updates)],
        )  # fmt: skip
        done += len(updates)
        kept = np.ones(len(places), bool)
        kept[gone] = False
        gone[:] = places[gone]
        places, row, updates = places[kept], row[kept], updates[:, kept]
        if done < most:
            inverse = inverse[np.ix_(kept, kept)]
            inverse -= updates.T @ updates
    return removed, losses


def _least_squares(row: np.ndarray, gram: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the values of the weights kept by which outputs are nearest to those of `row`."""
    result = np.where(kept, row, 0.0)
    if kept.any() and not kept.all():
        lost = gram[np.ix_(kept, ~kept)] @ row[~kept]
        factor = scipy.linalg.cho_factor(gram[np.ix_(kept, kept)], overwrite_a=True)
        result[kept] += scipy.linalg.cho_solve(factor, lost)
    return result
