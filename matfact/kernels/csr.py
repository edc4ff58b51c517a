"""Rows of scattered nonzeros times a panel of columns, or a single one."""

from __future__ import annotations

import numba

from matfact.kernels.vectors import (
    add,
    fma,
    gather,
    load,
    load_values,
    prefetch,
    spread,
    store,
    total,
    value,
    width,
)  # fmt: skip

_AHEAD = 512  #: entries between what is used and what is fetched: processors stop at memory pages


@numba.njit(nogil=True, cache=True)
def csr_panel(zero, values, columns, starts, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute rows `first` to `last` of a panel as wide as the vector `zero`.

    Row r has the entries from ``starts[r]`` to ``starts[r + 1]``. Four sums at a time hide the
    latency of an addition.
    """
    for row in range(first, last):
        a = b = c = d = zero
        e, end = starts[row], starts[row + 1]
        while e + 4 <= end:
            a = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), a)
            e += 1
            b = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), b)
            e += 1
            c = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), c)
            e += 1
            d = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), d)
            e += 1
        while e < end:
            a = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), a)
            e += 1
        store(target, row, add(add(a, b), add(c, d)))


@numba.njit(nogil=True, cache=True)
def csr_vector(zero, values, columns, starts, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute rows `first` to `last` for one column, as many entries at a time as `zero` has."""
    step = width(zero)
    for row in range(first, last):
        a = zero
        e, end = starts[row], starts[row + 1]
        while e + step <= end:
            prefetch(values, e + _AHEAD)
            prefetch(columns, e + _AHEAD)
            a = fma(load_values(values, e, zero), gather(source, columns, e, zero), a)
            e += step
        result = total(a)
        while e < end:
            result += value(values, e, source) * source[columns[e]]
            e += 1
        target[row] = result
