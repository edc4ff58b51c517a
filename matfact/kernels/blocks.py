"""Small dense blocks times a panel of columns, or a single one.

A block is ``count`` columns wide, its rows `lead` values apart; its columns meet the rows
``column, column + stride, …`` of the source.
"""

from __future__ import annotations

import numba
import numpy as np

from matfact.kernels.vectors import (
    fma,
    load,
    load_values,
    spread,
    store,
    total,
    value,
    width,
)  # fmt: skip

TILE = 4  #: rows computed together, which share what they load


@numba.njit(nogil=True, cache=True)
def _four_rows(a, b, c, d, values, first, lead, count, source, column, stride):  # type: ignore[no-untyped-def]
    second, third, fourth = first + lead, first + 2 * lead, first + 3 * lead
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k, source), x), x, a)
        b = fma(spread(value(values, second + k, source), x), x, b)
        c = fma(spread(value(values, third + k, source), x), x, c)
        d = fma(spread(value(values, fourth + k, source), x), x, d)
    return a, b, c, d


@numba.njit(nogil=True, cache=True)
def _two_rows(a, b, values, first, lead, count, source, column, stride):  # type: ignore[no-untyped-def]
    second = first + lead
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k, source), x), x, a)
        b = fma(spread(value(values, second + k, source), x), x, b)
    return a, b


@numba.njit(nogil=True, cache=True)
def _one_row(a, values, first, count, source, column, stride):  # type: ignore[no-untyped-def]
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k, source), x), x, a)
    return a


@numba.njit(nogil=True, cache=True)
def kronecker_panel(zero, values, origin, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute tiles `first` to `last` of a Kronecker-sparse factor.

    `pattern` is (a, b, c, d), `origin` the place of its first value. Tiles are counted block
    after block, in the order in which the values are stored, (a, d, b, c).
    """
    _, b, c, d = pattern
    tiles = (b + TILE - 1) // TILE
    block, part = first // tiles, first % tiles
    i, offset = block // d, block % d
    for _ in range(first, last):
        j = part * TILE
        start = origin + (block * b + j) * c
        column, row = i * c * d + offset, (i * b + j) * d + offset
        rows = min(TILE, b - j)
        if b == 2 and c == 2:  # a butterfly
            x, y = load(source, column, zero), load(source, column + d, zero)
            p = fma(spread(value(values, start, source), zero), x, zero)
            q = fma(spread(value(values, start + 2, source), zero), x, zero)
            p = fma(spread(value(values, start + 1, source), zero), y, p)
            q = fma(spread(value(values, start + 3, source), zero), y, q)
            store(target, row, p)
            store(target, row + d, q)
        elif rows == 4:
            p, q, r, s = _four_rows(zero, zero, zero, zero, values, start, c, c, source, column, d)
            store(target, row, p)
            store(target, row + d, q)
            store(target, row + 2 * d, r)
            store(target, row + 3 * d, s)
        else:
            if rows >= 2:
                p, q = _two_rows(zero, zero, values, start, c, c, source, column, d)
                store(target, row, p)
                store(target, row + d, q)
            if rows % 2:
                k = rows - 1
                p = _one_row(zero, values, start + k * c, c, source, column, d)
                store(target, row + k * d, p)
        part += 1
        if part == tiles:
            part = 0
            block += 1
            offset += 1
            if offset == d:
                offset = 0
                i += 1


@numba.njit(nogil=True, cache=True)
def band_panel(zero, values, tiles, pieces, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute tiles `first` to `last` of a matrix of dense pieces.

    A tile is (first row, rows, first piece, piece after the last); a piece is (place of the
    value in its first row and column, values from row to row, first column, columns).
    """
    for t in range(first, last):
        row, rows, begin, end = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
        a = b = c = d = zero
        if rows == 4:
            for p in range(begin, end):
                start, lead, column, count = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
                a, b, c, d = _four_rows(
                    a, b, c, d, values, start, lead, count, source, column, 1
                )  # fmt: skip
            store(target, row, a)
            store(target, row + 1, b)
            store(target, row + 2, c)
            store(target, row + 3, d)
            continue
        for k in range(rows):
            a = zero
            for p in range(begin, end):
                start, lead, column, count = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
                a = _one_row(a, values, start + k * lead, count, source, column, 1)
            store(target, row + k, a)


@numba.njit(nogil=True, cache=True)
def _dot(zero, values, start, count, source, column):  # type: ignore[no-untyped-def]
    """Return the product of a row of a block with consecutive entries of one column."""
    step = width(zero)
    k, a = 0, zero
    while k + step <= count:
        a = fma(load_values(values, start + k, zero), load_values(source, column + k, zero), a)
        k += step
    result = total(a)
    while k < count:
        result += value(values, start + k, source) * source[column + k]
        k += 1
    return result


@numba.njit(nogil=True, cache=True)
def kronecker_vector(zero, values, origin, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute blocks `first` to `last` of a Kronecker-sparse factor for one column."""
    _, b, c, d = pattern
    gathered = np.empty(c, source.dtype)
    for block in range(first, last):
        i, offset = block // d, block % d
        start, column, row = origin + block * b * c, i * c * d + offset, i * b * d + offset
        if b == 2 and c == 2:
            x, y = source[column], source[column + d]
            v, w = value(values, start, source), value(values, start + 1, source)
            target[row] = v * x + w * y
            v, w = value(values, start + 2, source), value(values, start + 3, source)
            target[row + d] = v * x + w * y
            continue
        for k in range(c):
            gathered[k] = source[column + k * d]
        for j in range(b):
            target[row + j * d] = _dot(zero, values, start + j * c, c, gathered, 0)


@numba.njit(nogil=True, cache=True)
def band_vector(zero, values, tiles, pieces, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute tiles `first` to `last` of a matrix of dense pieces for one column."""
    for t in range(first, last):
        row, rows, begin, end = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
        for k in range(rows):
            result = source.dtype.type(0)
            for p in range(begin, end):
                start, lead, column, count = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
                result += _dot(zero, values, start + k * lead, count, source, column)
            target[row + k] = result
