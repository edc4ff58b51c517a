"""Matrices of small integers and of scales that groups of them share.

As many rows as a vector has lanes are a slice, which consists of parts, one for each group of
values that share a scale: the first entry of each row's group, then the second, and so on. Where
a group has fewer entries than those of other rows, some of its integers are stored as two halves:
no infinite number is multiplied by a zero that is not there.
"""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled
from matfact.kernels.gathers import gather
from matfact.kernels.vectors import (
    add,
    fma,
    load,
    load_values,
    multiply,
    position,
    prefetch,
    scatter,
    spread,
    store,
    value,
    width,
    zeros,
)  # fmt: skip
from matfact.kernels.words import load_bytes

VECTOR = 64  #: bytes of the vectors of a slice
_AHEAD = 512  #: bytes between what is used and what is fetched
_DECODED = 64  #: entries of a row decoded together


@compiled()
def sliced(order, firsts, sizes, splittable, lanes):  # type: ignore[no-untyped-def]
    """Return the first place in `order` of each slice of rows, and how many entries and parts.

    Row `r` has the groups ``firsts[r]`` to ``firsts[r + 1]``, of so many entries, of which so many
    can be split. Rows of a slice have as many groups, which can be made equally long.
    """
    begins, entries, parts, place = [0], 0, 0, 0
    while place < len(order):
        first = firsts[order[place]]
        count = firsts[order[place] + 1] - first
        longest = sizes[first : first + count].copy()
        limit = longest + splittable[first : first + count]
        begin, place = place, place + 1
        while place < len(order) and place < begin + lanes:
            g = firsts[order[place]]
            if firsts[order[place] + 1] - g != count:
                break
            longer = np.maximum(longest, sizes[g : g + count])
            tighter = np.minimum(limit, sizes[g : g + count] + splittable[g : g + count])
            if (longer > tighter).any():
                break
            longest, limit, place = longer, tighter, place + 1
        entries, parts = entries + longest.sum() * lanes, parts + count
        begins.append(place)
    return np.asarray(begins), entries, parts


@compiled()
def arranged(order, begins, firsts, bounds, levels, columns, n_entries, lanes):  # type: ignore[no-untyped-def]
    """Return slices of a matrix in compressed sparse rows, as `sliced` has found them.

    These are integers and their columns, the first part of each slice and its number of rows, the
    row of each lane, the first entry and the length of each part, and the group of each of its
    lanes. Lanes without a row repeat one.
    """
    integers, places = np.empty(n_entries, np.int8), np.empty(n_entries, np.int64)
    slices = np.empty((len(begins), 2), np.int64)
    n_parts = 0
    for s in range(len(begins) - 1):
        slices[s, 0], slices[s, 1] = n_parts, begins[s + 1] - begins[s]
        n_parts += firsts[order[begins[s]] + 1] - firsts[order[begins[s]]]
    slices[-1, 0], slices[-1, 1] = n_parts, 0
    rows = np.empty((len(begins) - 1, lanes), np.int64)
    parts, groups = np.zeros((n_parts, 3), np.int64), np.empty((n_parts, lanes), np.int64)
    e = 0
    for s in range(len(rows)):
        for lane in range(lanes):
            rows[s, lane] = order[min(begins[s] + lane, begins[s + 1] - 1)]
        for p in range(slices[s, 0], slices[s + 1, 0]):
            length = 0
            for lane in range(lanes):
                g = groups[p, lane] = firsts[rows[s, lane]] + p - slices[s, 0]
                length = max(length, bounds[g + 1] - bounds[g])
            parts[p, 0], parts[p, 1] = e, length
            for lane in range(lanes):
                g, to = groups[p, lane], e + lane
                missing = length - (bounds[g + 1] - bounds[g])
                for k in range(bounds[g], bounds[g + 1]):
                    level = levels[k]
                    if missing > 0 and abs(level) != 1:
                        integers[to], places[to] = level // 2, columns[k]
                        level -= level // 2
                        to += lanes
                        missing -= 1
                    integers[to], places[to] = level, columns[k]
                    to += lanes
            e += length * lanes
    return integers, places, slices, rows, parts, groups


@compiled()
def quantized_vector(  # type: ignore[no-untyped-def]
    zero, levels, scales, columns, slices, rows, parts, is_scattered, first, last, source, target
):
    """Compute slices `first` to `last` for one column."""
    lanes = width(zero)
    for s in range(first, last):
        a = b = c = d = zero
        for p in range(slices[2 * s], slices[2 * s + 2]):
            e, count, column = parts[3 * p], parts[3 * p + 1], parts[3 * p + 2]
            scale = load_bytes(scales, VECTOR * p, zero)
            if is_scattered:
                for _ in range(count):
                    prefetch(levels, e + _AHEAD)
                    prefetch(columns, e + _AHEAD)
                    entries = multiply(load_values(levels, e, zero), scale)
                    a = fma(entries, gather(source, columns, e, zero), a)
                    e += lanes
                continue
            for k in range(column, column + count // 4 * 4, 4):
                prefetch(levels, e + 4 * _AHEAD)
                a = _scaled(a, levels, e, scale, source[k])
                b = _scaled(b, levels, e + lanes, scale, source[k + 1])
                c = _scaled(c, levels, e + 2 * lanes, scale, source[k + 2])
                d = _scaled(d, levels, e + 3 * lanes, scale, source[k + 3])
                e += 4 * lanes
            for k in range(column + count // 4 * 4, column + count):
                a = _scaled(a, levels, e, scale, source[k])
                e += lanes
        scatter(target, rows, s * lanes, add(add(a, b), add(c, d)))


@compiled()
def _scaled(total, levels, e, scale, x):  # type: ignore[no-untyped-def]
    return fma(multiply(load_values(levels, e, total), scale), spread(x, total), total)


@compiled()
def quantized_panel(  # type: ignore[no-untyped-def]
    zero, levels, scales, columns, slices, rows, parts, is_scattered, first, last, source, target
):
    """Compute slices `first` to `last` of a panel: some entries are decoded, and then used."""
    like = zeros(source, VECTOR)
    lanes = width(like)
    decoded = np.empty(_DECODED * lanes, source.dtype)
    for s in range(first, last):
        begin, end, n_rows = slices[2 * s], slices[2 * s + 2], slices[2 * s + 1]
        own = rows[s * lanes :]
        if begin == end:
            for lane in range(n_rows):
                store(target, own[lane], zero)
        is_first = True
        for p in range(begin, end):
            e, left, column = parts[3 * p], parts[3 * p + 1], parts[3 * p + 2]
            scale = load_bytes(scales, VECTOR * p, like)
            while left > 0:
                count = min(left, _DECODED)
                for k in range(count):
                    prefetch(levels, e + k * lanes + 4 * _AHEAD)
                    entries = multiply(load_values(levels, e + k * lanes, like), scale)
                    store(decoded, k, entries)
                where = (columns[e:], column, is_scattered)
                # Lanes that repeat a row do so among those taken together: all of these are read,
                # then written.
                if width(zero) == lanes:
                    for lane in range(0, n_rows, 8):
                        _eight_rows(
                            zero, is_first, decoded, lane, lanes, count, where, own, source, target
                        )  # fmt: skip
                else:
                    for lane in range(0, n_rows, 4):
                        _four_rows(
                            zero, is_first, decoded, lane, lanes, count, where, own, source, target
                        )  # fmt: skip
                is_first = False
                e, left, column = e + count * lanes, left - count, column + count


@compiled()
def _four_rows(zero, is_first, decoded, lane, lanes, count, where, rows, source, target):  # type: ignore[no-untyped-def]
    """Add entries of four rows, times what they meet, to a panel as wide as several vectors."""
    columns, column, is_scattered = where
    a = b = c = d = zero
    if not is_first:
        a, b = load(target, rows[lane], zero), load(target, rows[lane + 1], zero)
        c, d = load(target, rows[lane + 2], zero), load(target, rows[lane + 3], zero)
    if is_scattered:
        for i in range(lane, lane + count * lanes, lanes):
            prefetch(columns, i + _AHEAD)
            a = _plus_row(a, decoded, i, columns, source)
            b = _plus_row(b, decoded, i + 1, columns, source)
            c = _plus_row(c, decoded, i + 2, columns, source)
            d = _plus_row(d, decoded, i + 3, columns, source)
    else:
        for k in range(count):
            i, x = lane + k * lanes, load(source, column + k, zero)
            a, b = _plus(a, decoded, i, x, source), _plus(b, decoded, i + 1, x, source)
            c, d = _plus(c, decoded, i + 2, x, source), _plus(d, decoded, i + 3, x, source)
    store(target, rows[lane], a)
    store(target, rows[lane + 1], b)
    store(target, rows[lane + 2], c)
    store(target, rows[lane + 3], d)


@compiled()
def _eight_rows(zero, is_first, decoded, lane, lanes, count, where, rows, source, target):  # type: ignore[no-untyped-def]
    """Add entries of eight rows to a panel as wide as a vector: fewer sums wait for another."""
    columns, column, is_scattered = where
    a = b = c = d = p = q = r = t = zero
    if not is_first:
        a, b = load(target, rows[lane], zero), load(target, rows[lane + 1], zero)
        c, d = load(target, rows[lane + 2], zero), load(target, rows[lane + 3], zero)
        p, q = load(target, rows[lane + 4], zero), load(target, rows[lane + 5], zero)
        r, t = load(target, rows[lane + 6], zero), load(target, rows[lane + 7], zero)
    if is_scattered:
        for i in range(lane, lane + count * lanes, lanes):
            prefetch(columns, i + _AHEAD)
            a = _plus_row(a, decoded, i, columns, source)
            b = _plus_row(b, decoded, i + 1, columns, source)
            c = _plus_row(c, decoded, i + 2, columns, source)
            d = _plus_row(d, decoded, i + 3, columns, source)
            p = _plus_row(p, decoded, i + 4, columns, source)
            q = _plus_row(q, decoded, i + 5, columns, source)
            r = _plus_row(r, decoded, i + 6, columns, source)
            t = _plus_row(t, decoded, i + 7, columns, source)
    else:
        for k in range(count):
            i, x = lane + k * lanes, load(source, column + k, zero)
            a, b = _plus(a, decoded, i, x, source), _plus(b, decoded, i + 1, x, source)
            c, d = _plus(c, decoded, i + 2, x, source), _plus(d, decoded, i + 3, x, source)
            p, q = _plus(p, decoded, i + 4, x, source), _plus(q, decoded, i + 5, x, source)
            r, t = _plus(r, decoded, i + 6, x, source), _plus(t, decoded, i + 7, x, source)
    store(target, rows[lane], a)
    store(target, rows[lane + 1], b)
    store(target, rows[lane + 2], c)
    store(target, rows[lane + 3], d)
    store(target, rows[lane + 4], p)
    store(target, rows[lane + 5], q)
    store(target, rows[lane + 6], r)
    store(target, rows[lane + 7], t)


@compiled()
def _plus(total, decoded, i, x, source):  # type: ignore[no-untyped-def]
    return fma(spread(value(decoded, i, source), total), x, total)


@compiled()
def _plus_row(total, decoded, i, columns, source):  # type: ignore[no-untyped-def]
    return _plus(total, decoded, i, load(source, position(columns, i), total), source)
