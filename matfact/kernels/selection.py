"""Exact top-k selection: k entries, also under ties."""

from __future__ import annotations

from matfact import backend
from matfact.backend import Array


def top_k_mask(scores: Array, k: int, axis: int | None = None) -> Array:
    """Return a boolean mask of exactly the `k` largest `scores`.

    Parameters
    ----------
    scores : array
        Real scores without NaN.
    k : int
        How many to keep, overall or in every slice along `axis`; at most all of them.
    axis : int, optional
        Axis along which each slice is selected on its own.

    Returns
    -------
    array of bool, of the shape of `scores`
        Among equal scores the earlier in C order are kept, on every array library.
    """
    xp = backend.namespace(scores)
    if axis is None:
        return xp.reshape(top_k_mask(xp.reshape(scores, (-1,)), k, axis=0), scores.shape)
    if k <= 0:
        return xp.zeros_like(scores, dtype=xp.bool)
    if k >= scores.shape[axis]:
        return xp.ones_like(scores, dtype=xp.bool)
    threshold = backend.kth_largest(scores, k, axis=axis)
    mask = scores >= threshold
    kept = xp.count_nonzero(mask, axis=axis, keepdims=True)
    if bool(xp.all(kept == k)):
        return mask
    above = scores > threshold
    missing = k - xp.count_nonzero(above, axis=axis, keepdims=True)
    tied = mask & ~above
    order = xp.cumulative_sum(xp.astype(tied, xp.int64), axis=axis)
    return above | (tied & (order <= missing))
