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
from matfact.kernels.words import add_lanes, add_rows, bit_signs

VECTOR = 64  #: bytes of the words of as many rows as a vector has lanes: a slice
#: Words of a row that stand together: first those of all rows, then the next of all rows.
GROUP = 4
_TABLES = 1 << 15  #: bytes of tables in use at a time, which stay in a core's own cache


def layout(itemsize: int) -> tuple[int, int]:
    """Return the columns of a code and the codes of a word, for numbers of so many bytes."""
    return (4, 8) if itemsize == 4 else (3, 16)


@compiled()
def _aligned(size, like):  # type: ignore[no-untyped-def]
    """Return an array that begins with a cache line: reads across two take twice as long."""
    memory = np.empty(size + VECTOR // like.itemsize, like.dtype)
    skipped = -memory.ctypes.data % VECTOR // like.itemsize
    return memory[skipped : skipped + size]


@compiled()
def sign_vector(zero, words, n_words, columns, rows, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` of a matrix of signs for one column."""
    lanes = width(zero)
    per_code, n_codes = (4, 8) if lanes == 16 else (3, 16)
    size, n_slices = n_codes * lanes, (rows + lanes - 1) // lanes
    tables, sums = _aligned(GROUP * size, source), _aligned((last - first) * lanes, source)
    for begin in range(0, n_words, GROUP):
        count = min(GROUP, n_words - begin)
        for t in range(count * n_codes):
            table = zero
            for j in range(per_code):
                k = (begin * n_codes + t) * per_code + j
                x = source[k] if k < columns else source.dtype.type(0)
                table = fma(bit_signs(j, zero), spread(x, zero), table)
            store(tables, t, table)
        for s in range(first, last):
            a = load(sums, s - first, zero) if begin > 0 else zero
            at = (begin * n_slices + s * count) * VECTOR
            for w in range(count):
                a = add_lanes(a, tables, w * size, words, at + w * VECTOR)
            store(sums, s - first, a)
    for row in range(first * lanes, min(last * lanes, rows)):
        target[row] = sums[row - first * lanes]


@compiled()
def sign_panel(zero, words, n_words, columns, rows, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute slices `first` to `last` of a matrix of signs for a panel."""
    lanes = width(zeros(source, VECTOR))
    per_code, n_codes = (4, 8) if lanes == 16 else (3, 16)
    size, n_slices = n_codes * lanes * width(zero), (rows + lanes - 1) // lanes
    together = min(GROUP, max(1, _TABLES // (size * VECTOR // lanes)))
    tables = _aligned(together * size, source)
    for begin in range(0, n_words, together):
        group = begin // GROUP * GROUP
        count, end = min(GROUP, n_words - group), min(begin + together, n_words)
        for t in range((end - begin) * n_codes):
            column = (begin * n_codes + t) * per_code
            _write_table(zero, tables, t * lanes, column, per_code, columns, source)
        for row in range(first * lanes, min(last * lanes, rows)):
            a = load(target, row, zero) if begin > 0 else zero
            at = (group * n_slices + row // lanes * count + begin - group) * VECTOR
            at += row % lanes * (VECTOR // lanes)
            for w in range(end - begin):
                a = add_rows(a, tables, w * size, words, at + w * VECTOR)
            store(target, row, a)


@compiled()
def _write_table(zero, tables, at, column, per_code, columns, source):  # type: ignore[no-untyped-def]
    """Write all sums, with signs, of a few rows of a panel, from row `column` on."""
    store(tables, at, zero)
    for j in range(per_code):
        x = load(source, column + j, zero) if column + j < columns else zero
        for m in range(1 << j):
            sums = load(tables, at + m, zero)
            store(tables, at + m, subtract(sums, x))
            store(tables, at + m + (1 << j), add(sums, x))
