"""Matrices of signs, one bit an entry.

The signs of a row stand in words of codes. A code is one sign each of a few columns: the place of
the sum of these columns, with these signs, in a table of all such sums, which all rows share.
"""

from __future__ import annotations

import numpy as np

from matfact.kernels.compilation import compiled
from matfact.kernels.vectors import (
    add,
    fma,
    load,
    spread,
    store,
    subtract,
    width,
    zeros,
)  # fmt: skip
from matfact.kernels.words import bit_signs, code, looked_up

VECTOR = 64  #: bytes of the words of as many rows as a vector has lanes: a slice
_TABLES = 1 << 15  #: bytes of tables in use at a time, which stay in a core's own cache
_BLOCK = 4  #: slices computed together for one column


def layout(itemsize: int) -> tuple[int, int]:
    """Return the columns of a code and the codes of a word, for numbers of so many bytes."""
    return (4, 8) if itemsize == 4 else (3, 16)


_layout = compiled()(layout)


@compiled()
def sign_vector(zero, words, n_words, columns, rows, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` of a matrix of signs for one column."""
    lanes = width(zero)
    per_code, n_codes = _layout(source.itemsize)
    tables = np.empty(n_words * n_codes * lanes, source.dtype)
    for t in range(n_words * n_codes):
        sums = zero
        for j in range(per_code):
            k = t * per_code + j
            x = source[k] if k < columns else source.dtype.type(0)
            sums = fma(bit_signs(j, zero), spread(x, zero), sums)
        store(tables, t, sums)
    size = n_words * VECTOR
    for begin in range(first, last, _BLOCK):
        if begin + _BLOCK <= last:
            a = b = c = d = zero
            for w in range(n_words):
                at = begin * size + w * VECTOR
                for i in range(n_codes):
                    sums = load(tables, w * n_codes + i, zero)
                    a = add(a, looked_up(sums, words, at, i))
                    b = add(b, looked_up(sums, words, at + size, i))
                    c = add(c, looked_up(sums, words, at + 2 * size, i))
                    d = add(d, looked_up(sums, words, at + 3 * size, i))
            _store_rows(a, begin, rows, target)
            _store_rows(b, begin + 1, rows, target)
            _store_rows(c, begin + 2, rows, target)
            _store_rows(d, begin + 3, rows, target)
            continue
        for s in range(begin, last):
            a = zero
            for w in range(n_words):
                for i in range(n_codes):
                    sums = load(tables, w * n_codes + i, zero)
                    a = add(a, looked_up(sums, words, s * size + w * VECTOR, i))
            _store_rows(a, s, rows, target)


@compiled()
def _store_rows(vector, s, rows, target):  # type: ignore[no-untyped-def]
    """Write a slice, which may have more lanes than there are rows."""
    lanes = width(vector)
    if (s + 1) * lanes <= rows:
        store(target, s, vector)
        return
    last = np.empty(lanes, target.dtype)
    store(last, 0, vector)
    for lane in range(rows - s * lanes):
        target[s * lanes + lane] = last[lane]


@compiled()
def sign_panel(zero, words, n_words, columns, rows, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` of a matrix of signs for a panel."""
    lanes = width(zeros(source, VECTOR))
    per_code, n_codes = _layout(source.itemsize)
    together = max(1, _TABLES // (n_codes * lanes * width(zero) * source.itemsize))
    tables = np.empty(together * n_codes * lanes * width(zero), source.dtype)
    begin, end = first * lanes, min(last * lanes, rows)
    for w in range(0, n_words, together):
        count = min(together, n_words - w)
        for t in range(count * n_codes):
            _add_table(zero, tables, t * lanes, (w * n_codes + t) * per_code, per_code, columns, source)
        for row in range(begin, end // 4 * 4, 4):
            a = b = c = d = zero
            if w > 0:
                a, b = load(target, row, zero), load(target, row + 1, zero)
                c, d = load(target, row + 2, zero), load(target, row + 3, zero)
            at = (row // lanes * n_words + w) * VECTOR + row % lanes * source.itemsize
            for t in range(0, count * n_codes, n_codes):
                for i in range(n_codes):
                    k = (t + i) * lanes
                    a = _plus_sum(a, words, at, i, tables, k, source)
                    b = _plus_sum(b, words, at + source.itemsize, i, tables, k, source)
                    c = _plus_sum(c, words, at + 2 * source.itemsize, i, tables, k, source)
                    d = _plus_sum(d, words, at + 3 * source.itemsize, i, tables, k, source)
                at += VECTOR
            store(target, row, a)
            store(target, row + 1, b)
            store(target, row + 2, c)
            store(target, row + 3, d)
        for row in range(max(begin, end // 4 * 4), end):
            a = load(target, row, zero) if w > 0 else zero
            at = (row // lanes * n_words + w) * VECTOR + row % lanes * source.itemsize
            for t in range(0, count * n_codes, n_codes):
                for i in range(n_codes):
                    a = _plus_sum(a, words, at, i, tables, (t + i) * lanes, source)
                at += VECTOR
            store(target, row, a)


@compiled()
def _plus_sum(total, words, at, i, tables, k, source):  # type: ignore[no-untyped-def]
    return add(total, load(tables, k + code(words, at, i, source), total))


@compiled()
def _add_table(zero, tables, at, column, per_code, columns, source):  # type: ignore[no-untyped-def]
    """Write all sums of a few rows of a panel with signs, from row `column` on."""
    store(tables, at, zero)
    for j in range(per_code):
        x = load(source, column + j, zero) if column + j < columns else zero
        for m in range(1 << j):
            sums = load(tables, at + m, zero)
            store(tables, at + m, subtract(sums, x))
            store(tables, at + m + (1 << j), add(sums, x))
