"""Rounding the values of a sparse matrix one by one, with regard to the errors of the others."""

from __future__ import annotations

from matfact.kernels.compilation import compiled

#: Gains below this share of a value's own cost are rounding.
_GAIN = 1e-6


@compiled()
def round_rows(codes, scales, levels, indices, indptr, gradient, gram, passes):  # type: ignore[no-untyped-def]
    """Change the levels of each row `x` while that lowers ``x G xᵀ − 2 c xᵀ``.

    Parameters
    ----------
    codes : ndarray of int, of shape (nnz,)
        Index of the level of each value. Overwritten.
    scales : ndarray of shape (nnz,)
        Scale of each value. Values of scale 0 stay as they are.
    levels : ndarray of shape (n_levels,)
        Increasing levels.
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
                code = _nearest(levels, wanted)
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


@compiled()
def _nearest(levels, value):  # type: ignore[no-untyped-def]
    """Return the index of the nearest of some increasing levels."""
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if 2 * value > levels[middle] + levels[middle + 1]:
            low = middle + 1
        else:
            high = middle
    return low
