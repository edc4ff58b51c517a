"""Values rounded to few levels times a scale for each group of them."""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled


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
