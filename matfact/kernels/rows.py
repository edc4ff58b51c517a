"""Products of matrices in compressed sparse rows, as they are stored, with a single column.

Rows of some length are multiplied nearly as fast as the slices of ``csr``, and need no rearranged
copy, which takes memory and has to be kept up to date.
"""

from __future__ import annotations

import numba

from matfact.kernels import fused
from matfact.kernels.compilation import compiled
from matfact.kernels.gathers import gather
from matfact.kernels.vectors import (
    add,
    first_lanes,
    fma,
    load_values,
    prefetch,
    total,
    value,
    width,
    zeros,
)  # fmt: skip

#: Digest of the modules inlined here. Numba compiles anew when this file changes, and only then.
SOURCES = "c4035ff481121fb3"

_DOT = 64  #: bytes of the vectors of a dot product
_AHEAD = 512  #: entries to prefetch ahead, as in ``csr``


@compiled()
def rows_vector(zero, values, columns, indptr, stored, first, last, source, target):  # type: ignore[no-untyped-def]
    """Compute rows `first` to `last` of a matrix with `stored` values."""
    lanes = width(zero)
    for row in range(first, last):
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
def _step(step, values, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    entries, columns = values[step[fused.VALUES] :], indices[step[fused.COLUMNS] :]
    indptr, zero = table[step[fused.TABLE] :], zeros(source, _DOT)
    stored = indptr[step[fused.ROWS]]
    rows_vector(zero, entries, columns, indptr, stored, part[0], part[1], source, target)


@compiled()
def apply_rows(job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply steps of compressed sparse rows; arguments as for the kernels of ``fused``."""
    fused.apply_to_vector(
        _step, job, values, indices, X, out, scratch, state, call, kernel, patience
    )  # fmt: skip
