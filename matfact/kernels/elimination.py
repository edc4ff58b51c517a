"""Greedy removal of weights from a regression, one at a time."""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled

#: Share of its variance that an input keeps at least, given the others: less is rounding.
ROUNDING = 1e-12


@compiled()
def remove(inverse, weights, diagonal, group, left, floor, updates, removed, losses):  # type: ignore[no-untyped-def]
    """Remove the weights that cost least, as many as there is room for, and return their number.

    Parameters
    ----------
    inverse : array of shape (n, n)
        Inverse Gram matrix, symmetric.
    weights, diagonal : array of shape (n,)
        Weights, and the diagonal of `inverse`; brought up to date.
    group : array of int, of shape (n,)
        Group of each weight.
    left : array of int, of shape (n_groups,)
        Weights left in each group; brought up to date.
    floor : int
        Weights that must be left in a group.
    updates : array of shape (steps, n)
        Filled with rows whose squares are to be subtracted from `inverse`.
    removed : array of int, of shape (steps,)
        Filled with the places of what was removed.
    losses : array of shape (steps,)
        Filled with what each cost.
    """
    n = len(weights)
    gone = np.zeros(n, np.bool_)
    for step in range(len(updates)):
        place, least = -1, np.inf
        for i in range(n):
            if not gone[i] and left[group[i]] > floor:
                loss = weights[i] * weights[i] / diagonal[i]
                if loss < least:
                    place, least = i, loss
        if place < 0:
            return step
        row = updates[step]
        row[:] = inverse[place]
        for earlier in range(step):
            factor = updates[earlier, place]
            for i in range(n):
                row[i] -= factor * updates[earlier, i]
        pivot = diagonal[place]
        change, root = weights[place] / pivot, 1.0 / np.sqrt(pivot)
        for i in range(n):
            weights[i] -= change * row[i]
            row[i] *= root
            diagonal[i] = max(diagonal[i] - row[i] * row[i], ROUNDING * diagonal[i])
        gone[place] = True
        left[group[place]] -= 1
        removed[step], losses[step] = place, least
    return len(updates)
