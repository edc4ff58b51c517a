"""Steps of programs whose values are bytes: integers with scales, signs, and rows' scales."""

from __future__ import annotations

import numba

from matfact.kernels.compilation import compiled
from matfact.kernels.panels import select_panel, select_vector
from matfact.kernels.quantized import quantized_panel, quantized_vector
from matfact.kernels.signs import sign_panel, sign_vector
from matfact.kernels.vectors import (
    load,
    load_values,
    multiply,
    spread,
    store,
    store_values,
    width,
    zeros,
)  # fmt: skip
from matfact.kernels.words import load_bytes, number

#: Kinds of steps besides selections, after those of ``fused``.
QUANTIZED, SIGNS, SCALES = range(4, 7)
#: Columns of a step, as in ``fused``.
_KIND, _ROWS, _VALUES, _COLUMNS, _TABLE, _A, _B, _C, _D = 0, 1, *range(4, 11)
_DOT = 64  #: bytes of the vectors of a single column


@numba.njit(inline="always")
def panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    """Do a part of a step of a panel."""
    kind, entries, positions = step[_KIND], values[step[_VALUES] :], table[step[_TABLE] :]
    if kind == QUANTIZED:
        quantized_panel(
            zero, entries, values[step[_C] :], indices[step[_COLUMNS] :], positions,
            table[step[_A] :], table[step[_B] :], step[_D], first, last, source, target,
        )  # fmt: skip
    elif kind == SIGNS:
        sign_panel(
            zero, entries, step[_A], step[_B], step[_ROWS], first, last, source, target
        )  # fmt: skip
    elif kind == SCALES:
        scale_panel(zero, entries, first, last, source, target)
    else:
        select_panel(zero, positions, first, last, source, target)


@numba.njit(inline="always")
def vector_step(step, values, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    """Do a part of a step of a single column."""
    kind, entries, positions = step[_KIND], values[step[_VALUES] :], table[step[_TABLE] :]
    first, last = part
    zero = zeros(source, _DOT)
    if kind == QUANTIZED:
        quantized_vector(
            zero, entries, values[step[_C] :], indices[step[_COLUMNS] :], positions,
            table[step[_A] :], table[step[_B] :], step[_D], first, last, source, target,
        )  # fmt: skip
    elif kind == SIGNS:
        sign_vector(
            zero, entries, step[_A], step[_B], step[_ROWS], first, last, source, target
        )  # fmt: skip
    elif kind == SCALES:
        scale_vector(zero, entries, first, last, source, target)
    else:
        select_vector(positions, first, last, source, target)


@compiled()
def scale_panel(zero, scales, first, last, source, target):  # type: ignore[no-untyped-def]
    """Multiply rows `first` to `last` of a panel by a number each."""
    for row in range(first, last):
        scale = spread(number(scales, row * source.itemsize, source), zero)
        store(target, row, multiply(scale, load(source, row, zero)))


@compiled()
def scale_vector(zero, scales, first, last, source, target):  # type: ignore[no-untyped-def]
    """Do the same for one column."""
    row = first
    while row + width(zero) <= last:
        scale = load_bytes(scales, row * source.itemsize, zero)
        store_values(target, row, multiply(scale, load_values(source, row, zero)))
        row += width(zero)
    while row < last:
        target[row] = number(scales, row * source.itemsize, source) * source[row]
        row += 1
