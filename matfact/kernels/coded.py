"""Steps of programs whose values are bytes: integers with scales, signs, and rows' scales."""

from __future__ import annotations

from numba import types
from numba.extending import overload

from matfact.kernels.compilation import compiled
from matfact.kernels.quantized import quantized_panel, quantized_vector
from matfact.kernels.signs import sign_panel, sign_vector
from matfact.kernels.vectors import load, load_values, multiply, spread, store, store_values, width
from matfact.kernels.words import load_bytes, number

#: Kinds of steps, after those of ``fused``, and their columns in a step.
QUANTIZED, SIGNS, SCALES = range(4, 7)
_ROWS, _VALUES, _COLUMNS, _TABLE, _A, _B, _C, _D = 1, *range(4, 11)


def panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    """Do a part of a step of a panel; of programs without such steps, nothing is compiled."""


def vector_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    """Do a part of a step of a single column."""


@overload(panel_step)
def _panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    def nothing(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
        pass

    def coded(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
        if step[0] == QUANTIZED:
            quantized_panel(
                zero, values[step[_VALUES] :], values[step[_C] :], indices[step[_COLUMNS] :],
                table[step[_TABLE] :], table[step[_A] :], table[step[_B] :], step[_D],
                first, last, source, target,
            )  # fmt: skip
        elif step[0] == SIGNS:
            sign_panel(
                zero, values[step[_VALUES] :], step[_A], step[_B], step[_ROWS], first, last,
                source, target,
            )  # fmt: skip
        else:
            scale_panel(zero, values[step[_VALUES] :], first, last, source, target)

    return coded if values.dtype == types.int8 else nothing


@overload(vector_step)
def _vector_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    def nothing(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
        pass

    def coded(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
        if step[0] == QUANTIZED:
            quantized_vector(
                zero, values[step[_VALUES] :], values[step[_C] :], indices[step[_COLUMNS] :],
                table[step[_TABLE] :], table[step[_A] :], table[step[_B] :], step[_D],
                first, last, source, target,
            )  # fmt: skip
        elif step[0] == SIGNS:
            sign_vector(
                zero, values[step[_VALUES] :], step[_A], step[_B], step[_ROWS], first, last,
                source, target,
            )  # fmt: skip
        else:
            scale_vector(zero, values[step[_VALUES] :], first, last, source, target)

    return coded if values.dtype == types.int8 else nothing


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
