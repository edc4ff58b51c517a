"""Products of small dense blocks with a panel of columns, or a single column.

A block has ``count`` columns; its rows are `lead` values apart and its columns `step`. Its columns
multiply the rows ``column, column + stride, …`` of the source.

Small blocks of a Kronecker-sparse factor are interleaved, one per lane of a vector: the first entry
of each, then the second of each, and so on. A single column is then multiplied by all of them at
once.
"""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled
from matfact.kernels.gathers import gather
from matfact.kernels.vectors import (
    fma,
    load,
    load_values,
    scatter,
    spread,
    store,
    store_values,
    total,
    value,
    width,
    zeros,
)  # fmt: skip

VECTOR = 64  #: bytes of a vector with one entry from each of several interleaved blocks
TILE = 4  #: rows computed together, to share loads


@compiled()
def _four_rows(a, b, c, d, values, first, lead, step, count, source, column, stride):  # type: ignore[no-untyped-def]
    second, third, fourth = first + lead, first + 2 * lead, first + 3 * lead
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k * step, source), x), x, a)
        b = fma(spread(value(values, second + k * step, source), x), x, b)
        c = fma(spread(value(values, third + k * step, source), x), x, c)
        d = fma(spread(value(values, fourth + k * step, source), x), x, d)
    return a, b, c, d


@compiled()
def _two_rows(a, b, values, first, lead, step, count, source, column, stride):  # type: ignore[no-untyped-def]
    second = first + lead
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k * step, source), x), x, a)
        b = fma(spread(value(values, second + k * step, source), x), x, b)
    return a, b


@compiled()
def _one_row(a, values, first, step, count, source, column, stride):  # type: ignore[no-untyped-def]
    for k in range(count):
        x = load(source, column + k * stride, a)
        a = fma(spread(value(values, first + k * step, source), x), x, a)
    return a


@compiled()
def kronecker_panel(zero, values, together, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute tiles `first` to `last` of a Kronecker-sparse factor.

    `pattern` is (a, b, c, d). Tiles are numbered block after block, in the order (a, d) of blocks;
    the first `together` blocks are interleaved.
    """
    _, b, c, d = pattern
    lanes = width(zeros(source, VECTOR))
    tiles = (b + TILE - 1) // TILE
    block, part = first // tiles, first % tiles
    i, offset = block // d, block % d
    for _ in range(first, last):
        j = part * TILE
        start, step = block * b * c, 1
        if block < together:
            lane = block % lanes
            start, step = start - lane * b * c + lane, lanes
        start += j * c * step
        lead = c * step
        column, row = i * c * d + offset, (i * b + j) * d + offset
        rows = min(TILE, b - j)
        if b == 2 and c == 2:  # a butterfly
            x, y = load(source, column, zero), load(source, column + d, zero)
            p = fma(spread(value(values, start, source), zero), x, zero)
            q = fma(spread(value(values, start + lead, source), zero), x, zero)
            p = fma(spread(value(values, start + step, source), zero), y, p)
            q = fma(spread(value(values, start + lead + step, source), zero), y, q)
            store(target, row, p)
            store(target, row + d, q)
        elif rows == 4:
            if c == 4:  # the compiler unrolls loops of known length
                p, q, r, s = _four_rows(
                    zero, zero, zero, zero, values, start, lead, step, 4, source, column, d
                )  # fmt: skip
            else:
                p, q, r, s = _four_rows(
                    zero, zero, zero, zero, values, start, lead, step, c, source, column, d
                )  # fmt: skip
            store(target, row, p)
            store(target, row + d, q)
            store(target, row + 2 * d, r)
            store(target, row + 3 * d, s)
        else:
            if rows >= 2:
                p, q = _two_rows(zero, zero, values, start, lead, step, c, source, column, d)
                store(target, row, p)
                store(target, row + d, q)
            if rows % 2:
                k = rows - 1
                p = _one_row(zero, values, start + k * lead, step, c, source, column, d)
                store(target, row + k * d, p)
        part += 1
        if part == tiles:
            part = 0
            block += 1
            offset += 1
            if offset == d:
                offset = 0
                i += 1


@compiled()
def band_panel(zero, values, tiles, pieces, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute tiles `first` to `last` of a matrix of dense pieces.

    A tile is (first row, rows, first piece, end piece); a piece is (position of its first value,
    values from row to row, first column, columns).
    """
    for t in range(first, last):
        row, rows, begin, end = tiles[t, 0], tiles[t, 1], tiles[t, 2], tiles[t, 3]
        a = b = c = d = zero
        if rows == 4:
            for p in range(begin, end):
                start, lead, column, count = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
                a, b, c, d = _four_rows(
                    a, b, c, d, values, start, lead, 1, count, source, column, 1
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
                a = _one_row(a, values, start + k * lead, 1, count, source, column, 1)
            store(target, row + k, a)


@compiled()
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


@compiled()
def kronecker_vector(zero, values, places, together, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute units `first` to `last` of a Kronecker-sparse factor for one column.

    A unit is a block, or a group of interleaved blocks, one per lane of `zero`. `places` are the
    first columns of the blocks and, if they differ, their first rows.
    """
    a, b, c, d = pattern
    lanes = width(zero)
    if together > 0:
        whole = together // lanes
        if d % lanes == 0:
            _aligned_blocks(zero, values, pattern, first, min(last, whole), source, target)
        else:
            rows = places[a * d if b != c else 0 :]
            _scattered_blocks(
                zero, values, places, rows, pattern, first, min(last, whole), source, target
            )  # fmt: skip
        first, last = together, a * d if last > whole else together
    gathered = np.empty(c if last > first else 0, source.dtype)
    for block in range(first, last):
        i, offset = block // d, block % d
        start, column, row = block * b * c, i * c * d + offset, i * b * d + offset
        for k in range(c):
            gathered[k] = source[column + k * d]
        for j in range(b):
            target[row + j * d] = _dot(zero, values, start + j * c, c, gathered, 0)


@compiled()
def _aligned_blocks(zero, values, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute interleaved blocks with contiguous columns and rows."""
    _, b, c, d = pattern
    lanes = width(zero)
    for unit in range(first, last):
        i, offset = unit * lanes // d, unit * lanes % d
        column, row, start = i * c * d + offset, i * b * d + offset, unit * lanes * b * c
        for j in range(b):
            a = zero
            for k in range(c):
                x = load_values(source, column + k * d, zero)
                a = fma(load_values(values, start + (j * c + k) * lanes, zero), x, a)
            store_values(target, row + j * d, a)


@compiled()
def _scattered_blocks(zero, values, columns, rows, pattern, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute interleaved blocks with scattered columns and rows."""
    _, b, c, d = pattern
    lanes = width(zero)
    gathered = np.empty(c * lanes, source.dtype)
    for unit in range(first, last):
        block = unit * lanes
        start = block * b * c
        for k in range(c):
            store(gathered, k, gather(source[k * d :], columns, block, zero))
        for j in range(b):
            a = zero
            for k in range(c):
                entries = load_values(values, start + (j * c + k) * lanes, zero)
                a = fma(entries, load(gathered, k, zero), a)
            scatter(target[j * d :], rows, block, a)


@compiled()
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
