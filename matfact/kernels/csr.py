"""Products of sparse rows with a panel of columns, or a single column.

Rows of similar length form a slice, one row per lane of a vector. Entries that all rows of a slice
have are interleaved; the rest of longer rows follows, row after row. A single column then needs no
sums over lanes, and loop lengths rarely change, which avoids branch mispredictions.

The format follows Kreutzer et al., "A unified sparse matrix data format for efficient general
sparse matrix-vector multiplication on modern processors with wide SIMD units", SIAM J. Sci.
Comput. 36, 2014, who pad shorter rows with zeros. Here some of their entries are split into two
halves instead, so that infinity is never multiplied by a padding zero.
"""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled
from matfact.kernels.gathers import gather
from matfact.kernels.vectors import (
    fma,
    load,
    load_values,
    position,
    prefetch,
    scatter,
    spread,
    store,
    total,
    value,
    width,
    zeros,
)  # fmt: skip

_AHEAD = 512  #: entries to prefetch ahead: hardware prefetching stops at memory pages
_TAIL = 32  #: entries that take as long as starting the rest of a single row
#: Bytes of a panel's row up to which eight rows are computed together, reading slices twice. Of
#: wider rows, registers hold four.
_NARROW = 64


@compiled()
def arranged(indptr, order, lanes):  # type: ignore[no-untyped-def]
    """Return the slices of a matrix with rows sorted by decreasing length in `order`.

    Returns the first entry of each slice, the number of entries common to its rows and of rows
    with more, the end of each row, the matrix entry at each position, and its form: 0 for the
    whole value, 1 and 2 for its first and second half.
    """
    rows = len(order)
    lengths = indptr[order + 1] - indptr[order]
    slices = np.empty((-(-rows // lanes), 3), np.int64)
    ends, entries = np.empty(rows, np.int64), np.empty(2 * indptr[rows], np.int64)
    halves = np.zeros(2 * indptr[rows], np.int8)
    e = 0
    for s in range(len(slices)):
        first, last = s * lanes, min(rows, (s + 1) * lanes)
        common = _common(lengths[first:last]) if last - first == lanes else 0
        slices[s, 0], slices[s, 1], slices[s, 2] = e, common, last - first
        for place in range(first, last):
            begin, missing = indptr[order[place]], max(0, common - lengths[place])
            for k in range(common):
                to = e + k * lanes + place - first
                entries[to] = begin + max(k // 2, k - missing)
                halves[to] = 1 + k % 2 if k < 2 * missing else 0
        e += common * lanes
        for place in range(first, last):
            if common and lengths[place] <= common:
                slices[s, 2] -= 1
            for k in range(indptr[order[place]] + common, indptr[order[place] + 1]):
                entries[e] = k
                e += 1
            ends[place] = e
    return slices, ends, entries[:e], halves[:e]


@compiled()
def _common(lengths):  # type: ignore[no-untyped-def]
    """Return the number of interleaved entries per row, at most twice the shortest row."""
    best, least = 0, lengths.sum() + _TAIL * len(lengths)
    for common in lengths:
        if 0 < common <= 2 * lengths[-1]:
            time = common * len(lengths)
            for length in lengths:
                if length > common:
                    time += length - common + _TAIL
            if time < least:
                best, least = common, time
    return best


@compiled()
def csr_panel(zero, values, columns, slices, lanes, order, ends, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` of a panel as wide as the vector `zero`.

    The next slice is prefetched while a slice is computed, a few rows at a time.
    """
    are_eight = width(zero) == width(zeros(source, _NARROW)) and width(zero) >= 8
    for s in range(first, last):
        e, common, begin = slices[s, 0], slices[s, 1], s * lanes
        next_slice = common * lanes
        for place in range(begin, begin + lanes if common else begin, 8 if are_eight else 4):
            a = b = c = d = p = q = r = t = zero
            i = e + place - begin
            for _ in range(common):
                prefetch(values, i + next_slice)
                prefetch(columns, i + next_slice)
                a = _plus(a, values, columns, i, source)
                b = _plus(b, values, columns, i + 1, source)
                c = _plus(c, values, columns, i + 2, source)
                d = _plus(d, values, columns, i + 3, source)
                if are_eight:
                    p = _plus(p, values, columns, i + 4, source)
                    q = _plus(q, values, columns, i + 5, source)
                    r = _plus(r, values, columns, i + 6, source)
                    t = _plus(t, values, columns, i + 7, source)
                i += lanes
            store(target, order[place], a)
            store(target, order[place + 1], b)
            store(target, order[place + 2], c)
            store(target, order[place + 3], d)
            if are_eight:
                store(target, order[place + 4], p)
                store(target, order[place + 5], q)
                store(target, order[place + 6], r)
                store(target, order[place + 7], t)
        e += next_slice
        for place in range(begin, begin + slices[s, 2]):
            row = order[place]
            a = load(target, row, zero) if common else zero
            while e < ends[place]:
                a = _plus(a, values, columns, e, source)
                e += 1
            store(target, row, a)


@compiled()
def _plus(total, values, columns, e, source):  # type: ignore[no-untyped-def]
    """Add the product of an entry with its row of the panel."""
    row = load(source, position(columns, e), total)
    return fma(spread(value(values, e, source), total), row, total)


@compiled()
def csr_vector(zero, values, columns, slices, lanes, order, ends, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` for one column; `zero` has one lane per row of a slice."""
    for s in range(first, last):
        e, common, begin = slices[s, 0], slices[s, 1], s * lanes
        a = zero
        for _ in range(common):
            prefetch(values, e + _AHEAD)
            prefetch(columns, e + _AHEAD)
            a = fma(load_values(values, e, zero), gather(source, columns, e, zero), a)
            e += lanes
        if common:
            scatter(target, order, begin, a)
        for place in range(begin, begin + slices[s, 2]):
            row = order[place]
            rest, e = _rest(zero, values, columns, e, ends[place], source)
            target[row] = target[row] + rest if common else rest


@compiled()
def _rest(zero, values, columns, e, end, source):  # type: ignore[no-untyped-def]
    """Return the product of consecutive entries of a row with a column, and their end."""
    a = zero
    while e + width(zero) <= end:
        a = fma(load_values(values, e, zero), gather(source, columns, e, zero), a)
        e += width(zero)
    result = total(a)
    while e < end:
        result += value(values, e, source) * source[columns[e]]
        e += 1
    return result, e
