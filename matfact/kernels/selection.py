"""Exact top-k selection, also under ties."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array


def top_k_mask(array: Array, k: int, axis: int | None = None) -> Array:
    """Return a boolean mask of exactly the `k` entries of largest magnitude.

    Parameters
    ----------
    array : array
        Numbers without NaN.
    k : int
        Number of entries to keep, overall or in every slice along `axis`.
    axis : int, optional
        Axis along which each slice is selected separately.

    Returns
    -------
    array of bool, of the shape of `array`
        Among equal magnitudes the first in C order are kept, in every array library.
    """
    xp = backend.namespace(array)
    if axis is None:
        return xp.reshape(top_k_mask(xp.reshape(array, (-1,)), k, axis=0), array.shape)
    if k <= 0:
        return xp.zeros_like(array, dtype=xp.bool)
    if k >= array.shape[axis]:
        return xp.ones_like(array, dtype=xp.bool)
    if backend.is_numpy(array) and array.ndim == 1:
        return _top_k_of_vector(array, k)
    scores = xp.abs(array)
    threshold = backend.kth_largest(scores, k, axis=axis)
    mask = scores >= threshold
    if backend.is_on_host(mask):  # elsewhere, waiting for the answer takes longer than the rest
        kept = backend.count_nonzero(mask, axis=axis, keepdims=True)
        if bool(xp.all(kept == k)):
            return mask
    above = scores > threshold
    missing = k - backend.count_nonzero(above, axis=axis, keepdims=True)
    tied = mask & ~above
    dtype = backend.integer(tied)
    order = xp.cumulative_sum(xp.astype(tied, dtype), axis=axis, dtype=dtype)
    return above | (tied & (order <= missing))


def _top_k_of_vector(array: np.ndarray, k: int) -> np.ndarray:
    """Return the mask over all entries, using memory for one copy of them."""
    scores = np.abs(array)
    scores.partition(scores.size - k)
    threshold = scores[-k]
    np.abs(array, out=scores)
    mask = scores >= threshold
    if (surplus := np.count_nonzero(mask) - k) > 0:
        mask[np.flatnonzero(scores == threshold)[-surplus:]] = False
    return mask
