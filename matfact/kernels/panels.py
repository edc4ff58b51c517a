"""Column panels: the activations of a few columns, stored as one vector per row."""

from __future__ import annotations

from matfact.kernels.compilation import compiled
from matfact.kernels.vectors import load, load_values, store, store_values, width

_BLOCK = 16  #: rows read together if columns are contiguous: one cache line of each


@compiled()
def pack(zero, X, row_stride, column_stride, columns, first, last, target):  # type: ignore[no-untyped-def]
    """Copy rows `first` to `last` of `columns` columns of `X`, padded with zeros.

    `X` is flat and starts at the first of the columns.
    """
    lanes = width(zero)
    if columns == lanes and column_stride == 1:
        for row in range(first, last):
            store(target, row, load_values(X, row * row_stride, zero))
        return
    if columns < lanes:
        for row in range(first, last):
            store(target, row, zero)
    if column_stride == 1:
        for row in range(first, last):
            for t in range(columns):
                target[row * lanes + t] = X[row * row_stride + t]
        return
    for begin in range(first, last, _BLOCK):
        for t in range(columns):
            for row in range(begin, min(begin + _BLOCK, last)):
                target[row * lanes + t] = X[row * row_stride + t * column_stride]


@compiled()
def unpack(zero, source, first, last, columns, Y, row_stride, column_stride):  # type: ignore[no-untyped-def]
    """Copy rows `first` to `last` of a panel to `columns` columns of `Y`."""
    lanes = width(zero)
    if columns == lanes and column_stride == 1:
        for row in range(first, last):
            store_values(Y, row * row_stride, load(source, row, zero))
        return
    if column_stride == 1:
        for row in range(first, last):
            for t in range(columns):
                Y[row * row_stride + t] = source[row * lanes + t]
        return
    for begin in range(first, last, _BLOCK):
        for t in range(columns):
            for row in range(begin, min(begin + _BLOCK, last)):
                Y[row * row_stride + t * column_stride] = source[row * lanes + t]


@compiled()
def select_panel(zero, index, first, last, source, target):  # type: ignore[no-untyped-def]
    """Copy row ``index[r]`` to row r, or zeros where it is negative."""
    for row in range(first, last):
        chosen = index[row]
        store(target, row, load(source, chosen, zero) if chosen >= 0 else zero)


@compiled()
def select_vector(index, first, last, source, target):  # type: ignore[no-untyped-def]
    """Copy entry ``index[r]`` to entry r of a column, or zero where it is negative."""
    for row in range(first, last):
        chosen = index[row]
        target[row] = source[chosen] if chosen >= 0 else source.dtype.type(0)
