"""Values rounded to few levels times a scale for each group of them."""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled

#: Gains below this share of a value's own cost are rounding.
_GAIN = 1e-6


@compiled()
def nearest_level(value, thresholds):  # type: ignore[no-untyped-def]
    """Return how many of some increasing thresholds are below a value.

    There is one threshold less than some power of two, so that no branch has to be foretold.
    """
    below, step = 0, (len(thresholds) + 1) // 2
    while step > 0:
        below += step * (thresholds[below + step - 1] < value)
        step //= 2
    return below


@compiled()
def best_scales(values, weights, bounds, levels, thresholds, shares, scales):  # type: ignore[no-untyped-def]
    """Write the scale of each group with the least squared error that is found, 0 for zeros.

    Each share of the least scale by which no value is beyond the levels is tried, and followed by
    the least squares scale of the levels that values are rounded to with it.
    """
    farthest = max(abs(levels[0]), abs(levels[-1]))
    for group in range(len(bounds) - 1):
        first, last = bounds[group], bounds[group + 1]
        largest = 0.0
        for i in range(first, last):
            largest = max(largest, abs(values[i]))
        scales[group], explained = 0.0, 0.0
        if largest == 0.0:
            continue
        for share in shares:
            inverse = farthest / (share * largest)
            inner, energy = 0.0, 0.0
            for i in range(first, last):
                level = levels[nearest_level(values[i] * inverse, thresholds)]
                inner += weights[i] * level * values[i]
                energy += weights[i] * level * level
            if energy > 0.0 and inner * inner > explained * energy:
                explained = inner * inner / energy
                scales[group] = inner / energy


@compiled()
def level_means(values, weights, bounds, thresholds, scales, count):  # type: ignore[no-untyped-def]
    """Return weights and weighted sums of what is rounded to each level, in units of the scales."""
    mass, total = np.zeros(count), np.zeros(count)
    for group in range(len(bounds) - 1):
        scale = scales[group]
        if scale == 0.0:
            continue
        for i in range(bounds[group], bounds[group + 1]):
            code = nearest_level(values[i] / scale, thresholds)
            mass[code] += weights[i] * scale * scale
            total[code] += weights[i] * scale * values[i]
    return mass, total


@compiled()
def round_rows(codes, scales, levels, thresholds, indices, indptr, gradient, gram, passes):  # type: ignore[no-untyped-def]
    """Change the levels of each row `x` while that lowers ``x G xᵀ − 2 c xᵀ``.

    Parameters
    ----------
    codes : ndarray of int, of shape (nnz,)
        Index of the level of each value. Overwritten.
    scales : ndarray of shape (nnz,)
        Scale of each value. Values of scale 0 stay as they are.
    levels : ndarray of shape (n_levels,)
        Increasing levels.
    thresholds : ndarray
        What parts values by their nearest level, as for `nearest_level`.
    indices, indptr : ndarray
        Where the values stand, in compressed sparse rows.
    gradient : ndarray of shape (rows, k)
        ``X G − C``. Overwritten.
    gram : ndarray of shape (k, k)
        `G`.
    passes : int
        Passes over the values of a row, at most.
    """
    k = gram.shape[0]
    for i in range(len(indptr) - 1):
        for _ in range(passes):
            changed = False
            for e in range(indptr[i], indptr[i + 1]):
                j = indices[e]
                if gram[j, j] <= 0 or scales[e] == 0:
                    continue
                value = scales[e] * levels[codes[e]]
                wanted = (value - gradient[i, j] / gram[j, j]) / scales[e]
                code = nearest_level(wanted, thresholds)
                if code == codes[e]:
                    continue
                lost = (levels[codes[e]] - wanted) ** 2 - (levels[code] - wanted) ** 2
                if lost <= _GAIN * wanted**2:
                    continue
                change = scales[e] * levels[code] - value
                codes[e] = code
                changed = True
                for other in range(k):
                    gradient[i, other] += change * gram[j, other]
            if not changed:
                break
