"""Products of a matrix with samples, as it is stored in compressed sparse rows.

Values are floating-point numbers, or integers of a byte with a scale for each group of them. A
dense matrix of such integers is read too. Rows of some length are multiplied nearly as fast as the
slices of ``csr``, and need no rearranged copy, which takes memory and has to be kept up to date.
Kernels are functions of C, which any pool of threads can call for parts of the work.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from matfact.kernels import fused
from matfact.kernels.atomics import pointer
from matfact.kernels.compilation import callback
from matfact.kernels.gathers import gather
from matfact.kernels.vectors import (
    add,
    first_lanes,
    fma,
    load,
    load_values,
    multiply,
    prefetch,
    spread,
    store,
    total,
    value,
    width,
    zeros,
)  # fmt: skip

#: Digest of the modules inlined here. Numba compiles anew when this file changes, and only then.
SOURCES = "7f272d76ff446567"

_DOT = 64  #: bytes of the vectors of a dot product
_AHEAD = 512  #: entries to prefetch ahead, as in ``csr``


def _operand(values: Any) -> Any:
    """Return an array of the dtype in which values are computed, for compiled code."""
    raise NotImplementedError


@overload(_operand)
def _typed_operand(values):  # type: ignore[no-untyped-def]
    dtype = types.float64 if values.dtype == types.float64 else types.float32
    return lambda values: np.empty(0, dtype)


@numba.njit(inline="always")
def _matrix(step, values, indices, table):  # type: ignore[no-untyped-def]
    """Return values, columns and row pointers of a factor."""
    return values[step[fused.VALUES] :], indices[step[fused.COLUMNS] :], table[step[fused.TABLE] :]


@numba.njit(inline="always")
def _sample_step(step, values, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    """Compute some rows for a single sample."""
    values, columns, indptr = _matrix(step, values, indices, table)
    stored, zero = indptr[step[fused.ROWS]], zeros(source, _DOT)
    lanes = width(zero)
    for row in range(part[0], part[1]):
        e, end = indptr[row], indptr[row + 1]
        a = b = zero
        while e + 2 * lanes <= end:
            prefetch(values, e + _AHEAD)
            prefetch(values, e + lanes + _AHEAD)
            prefetch(columns, e + _AHEAD)
            a = fma(load_values(values, e, zero), gather(source, columns, e, zero), a)
            e += lanes
            b = fma(load_values(values, e, zero), gather(source, columns, e, zero), b)
            e += lanes
        # The rest is read with what follows in memory, while something does.
        while e < end and e + lanes <= stored:
            more = fma(load_values(values, e, zero), gather(source, columns, e, zero), a)
            a = first_lanes(end - e, more, a)
            e += lanes
        result = total(add(a, b))
        while e < end:
            result += value(values, e, source) * source[columns[e]]
            e += 1
        target[row] = result


@numba.njit(inline="always")
def _panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute rows `first` to `last` for a panel as wide as the vector `zero`."""
    values, columns, indptr = _matrix(step, values, indices, table)
    for row in range(first, last):
        e, end = indptr[row], indptr[row + 1]
        a = b = zero
        while e + 2 <= end:
            prefetch(values, e + _AHEAD)
            prefetch(columns, e + _AHEAD)
            a = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), a)
            e += 1
            b = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), b)
            e += 1
        if e < end:
            a = fma(spread(value(values, e, source), zero), load(source, columns[e], zero), a)
        store(target, row, add(a, b))


@numba.njit(inline="always")
def _scales(step, source):  # type: ignore[no-untyped-def]
    """Return the scales of a factor's groups, and their unit."""
    return numba.carray(pointer(step[fused.A], source), (1,)), source.dtype.type(1 / step[fused.C])


@numba.njit(inline="always")
def _first_groups(step):  # type: ignore[no-untyped-def]
    """Return the first group of each row of a sparse factor."""
    return numba.carray(pointer(step[fused.B], np.empty(0, np.int32)), (1,))


@numba.njit(inline="always")
def _next_border(border, over, size, spare, count):  # type: ignore[no-untyped-def]
    """Return where the next of `count` groups of nearly the same size ends, without a division.

    A row has ``size * count + spare`` entries. `over` starts at 0, and comes back for the next.
    """
    over += spare
    longer = over >= count
    return border + size + longer, over - count * longer


@numba.njit(inline="always")
def _add_first(count, numbers, source, place, sums):  # type: ignore[no-untyped-def]
    """Add the products of the first `count` numbers with what is in `source` from `place` on."""
    return first_lanes(count, fma(numbers, load_values(source, place, sums), sums), sums)


@numba.njit(inline="always")
def _coded_sample_step(step, codes, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    """Compute some rows of integers for a single sample.

    Vectors go on over the ends of groups: their lanes take the scale of the group they are in.
    """
    codes, columns, indptr = _matrix(step, codes, indices, table)
    (scales, unit), firsts = _scales(step, source), _first_groups(step)
    stored, zero = indptr[step[fused.ROWS]], zeros(source, _DOT)
    lanes = width(zero)
    for row in range(part[0], part[1]):
        e, end = indptr[row], indptr[row + 1]
        g, last = np.int64(firsts[row]), np.int64(firsts[row + 1])
        count, length, over = last - g, end - e, 0
        size, spare = (length // count, length % count) if count > 1 else (length, 0)
        a, rest, border = zero, unit - unit, e
        scale, scaled = rest, zero
        while e < end and e + lanes <= stored:
            here = scaled
            while border < e + lanes and g < last:
                scale = scales[g] * unit
                scaled = spread(scale, zero)
                here = first_lanes(border - e, here, scaled)
                border, over = _next_border(border, over, size, spare, count)
                g += 1
            prefetch(codes, e + _AHEAD)
            prefetch(columns, e + _AHEAD)
            entries = multiply(load_values(codes, e, zero), here)
            more = fma(entries, gather(source, columns, e, zero), a)
            a = more if e + lanes <= end else first_lanes(end - e, more, a)
            e += lanes
        while e < end:
            while e >= border and g < last:
                scale = scales[g] * unit
                border, over = _next_border(border, over, size, spare, count)
                g += 1
            rest += value(codes, e, source) * scale * source[columns[e]]
            e += 1
        target[row] = total(a) + rest


@numba.njit(inline="always")
def _dense_sample_step(step, codes, part, source, target):  # type: ignore[no-untyped-def]
    """Compute some rows of a dense matrix of integers, all with the same groups."""
    codes, count, columns = codes[step[fused.VALUES] :], step[fused.B], step[fused.D]
    scales, unit = _scales(step, source)
    zero = zeros(source, _DOT)
    lanes, size, spare = width(zero), columns // count, columns % count
    for row in range(part[0], part[1]):
        begin, a, rest, c, over = row * columns, zero, unit - unit, 0, 0
        for g in range(count * row, count * (row + 1)):
            end, over = _next_border(c, over, size, spare, count)
            prefetch(codes, begin + c + _AHEAD)
            inside = more = zero
            while c + 2 * lanes <= end:
                e = begin + c
                inside = fma(load_values(codes, e, zero), load_values(source, c, zero), inside)
                e, c = e + lanes, c + lanes
                more = fma(load_values(codes, e, zero), load_values(source, c, zero), more)
                c += lanes
            inside = add(inside, more)
            while c < end and c + lanes <= columns:  # what follows the group does not count
                numbers = load_values(codes, begin + c, zero)
                inside = _add_first(end - c, numbers, source, c, inside)
                c = min(c + lanes, end)
            scale = scales[g] * unit
            while c < end:
                rest += value(codes, begin + c, source) * scale * source[c]
                c += 1
            a = fma(inside, spread(scale, zero), a)
        target[row] = total(a) + rest


@numba.njit(inline="always")
def _dense_samples_step(step, codes, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    """Compute some rows of a dense matrix of integers for samples that follow one another.

    Integers become numbers once for four samples. Where fewer are left, the last repeats.
    """
    codes, count, columns = codes[step[fused.VALUES] :], step[fused.B], step[fused.D]
    scales, unit = _scales(step, source)
    zero, n_samples, rows = zeros(source, _DOT), step[fused.PANEL_UNITS], step[fused.ROWS]
    lanes, size, spare, last = width(zero), columns // count, columns % count, n_samples - 1
    for s in range(0, n_samples, 4):
        p, q, r = min(s + 1, last), min(s + 2, last), min(s + 3, last)
        w, x, y, z = s * columns, p * columns, q * columns, r * columns
        for row in range(part[0], part[1]):
            a = b = c = d = zero
            e = f = g = h = unit - unit
            begin, i, over = row * columns, 0, 0
            for group in range(count * row, count * (row + 1)):
                end, over = _next_border(i, over, size, spare, count)
                scale = scales[group] * unit
                scaled = spread(scale, zero)
                while i + lanes <= end:
                    numbers = multiply(load_values(codes, begin + i, zero), scaled)
                    a = fma(numbers, load_values(source, w + i, zero), a)
                    b = fma(numbers, load_values(source, x + i, zero), b)
                    c = fma(numbers, load_values(source, y + i, zero), c)
                    d = fma(numbers, load_values(source, z + i, zero), d)
                    i += lanes
                while i < end and i + lanes <= columns:  # what follows the group does not count
                    numbers = multiply(load_values(codes, begin + i, zero), scaled)
                    a = _add_first(end - i, numbers, source, w + i, a)
                    b = _add_first(end - i, numbers, source, x + i, b)
                    c = _add_first(end - i, numbers, source, y + i, c)
                    d = _add_first(end - i, numbers, source, z + i, d)
                    i = min(i + lanes, end)
                while i < end:
                    single = value(codes, begin + i, source) * scale
                    e, f = e + single * source[w + i], f + single * source[x + i]
                    g, h = g + single * source[y + i], h + single * source[z + i]
                    i += 1
            target[s * rows + row], target[p * rows + row] = total(a) + e, total(b) + f
            target[q * rows + row], target[r * rows + row] = total(c) + g, total(d) + h


@numba.njit(inline="always")
def _integer_sample_step(step, codes, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    """Compute some rows of integers for a single sample, dense or sparse."""
    if step[fused.D] > 0:
        _dense_sample_step(step, codes, part, source, target)
    else:
        _coded_sample_step(step, codes, indices, table, part, source, target)


@numba.njit(inline="always")
def _coded_panel_step(zero, step, codes, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute rows `first` to `last` of integers for a panel as wide as the vector `zero`."""
    codes, columns, indptr = _matrix(step, codes, indices, table)
    (scales, unit), firsts = _scales(step, source), _first_groups(step)
    for row in range(first, last):
        begin, length = indptr[row], indptr[row + 1] - indptr[row]
        group, count = np.int64(firsts[row]), np.int64(firsts[row + 1]) - firsts[row]
        a = b = zero
        for g in range(count):
            e, end = begin + length * g // count, begin + length * (g + 1) // count
            scale = scales[group + g] * unit
            prefetch(codes, e + _AHEAD)
            prefetch(columns, e + _AHEAD)
            while e + 2 <= end:
                x, y = load(source, columns[e], zero), load(source, columns[e + 1], zero)
                a = fma(spread(value(codes, e, source) * scale, zero), x, a)
                b = fma(spread(value(codes, e + 1, source) * scale, zero), y, b)
                e += 2
            if e < end:
                x = load(source, columns[e], zero)
                a = fma(spread(value(codes, e, source) * scale, zero), x, a)
        store(target, row, add(a, b))


@numba.njit(inline="always")
def _opened(data):  # type: ignore[no-untyped-def]
    """Return the job at an address, with typed arrays for the kernels of ``fused``."""
    values, columns = numba.carray(data, (1,)), np.empty(0, np.uint16)
    job = numba.carray(pointer(values.ctypes.data, np.empty(0, np.int64)), (fused.COUNTERS,))
    operand = _operand(values)
    X = numba.carray(pointer(job[fused.X_DATA], operand), (1,))
    out = numba.carray(pointer(job[fused.OUT_DATA], operand), (1,))
    scratch = numba.carray(pointer(job[fused.SCRATCH], operand), (1,))
    return job, values, columns, X, out, scratch


def _join_sample(first, last, data):  # type: ignore[no-untyped-def]
    """Help with the product of all factors with a single sample."""
    job, values, columns, X, out, scratch = _opened(data)
    fused.apply_to_vector(
        _sample_step, job, values, columns, X, out, scratch, job, 0, 0, 0
    )  # fmt: skip


def _join_panels(first, last, data):  # type: ignore[no-untyped-def]
    """Help with the product of all factors with panels of samples."""
    job, values, columns, X, out, scratch = _opened(data)
    fused.apply_to_panels(
        _panel_step, job, values, columns, X, out, scratch, job, 0, 0, 0
    )  # fmt: skip


def _join_coded_sample(first, last, data):  # type: ignore[no-untyped-def]
    """Help with the product of all factors of integers with a single sample."""
    job, codes, columns, X, out, scratch = _opened(data)
    fused.apply_to_vector(
        _integer_sample_step, job, codes, columns, X, out, scratch, job, 0, 0, 0
    )  # fmt: skip


def _join_dense_samples(first, last, data):  # type: ignore[no-untyped-def]
    """Help with the product of dense factors of integers with a few samples."""
    job, codes, columns, X, out, scratch = _opened(data)
    fused.apply_to_vector(
        _dense_samples_step, job, codes, columns, X, out, scratch, job, 0, 0, 0
    )  # fmt: skip


def _join_coded_panels(first, last, data):  # type: ignore[no-untyped-def]
    """Help with the product of all factors of integers with panels of samples."""
    job, codes, columns, X, out, scratch = _opened(data)
    fused.apply_to_panels(
        _coded_panel_step, job, codes, columns, X, out, scratch, job, 0, 0, 0
    )  # fmt: skip


@functools.cache
def kernel(dtype: type, is_single: bool, is_dense: bool = False) -> Any:
    """Return the compiled product of all factors with a single sample, or with several.

    It is called once by each thread, with the address of a job of ``fused``.

    Parameters
    ----------
    dtype : type
        Dtype of the values, of the bits of halves, or of integers with scales.
    is_single : bool
        Whether there is a single sample.
    is_dense : bool, default=False
        Whether all factors are dense matrices of integers. Samples then are not in panels, and
        the steps of the job have their number.
    """
    if is_dense and not is_single:
        return callback(_join_dense_samples, dtype)
    if dtype is np.int8:
        return callback(_join_coded_sample if is_single else _join_coded_panels, dtype)
    return callback(_join_sample if is_single else _join_panels, dtype)
