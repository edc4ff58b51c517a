"""All factors of a product in one call, by as many threads as come to help.

Each factor is a step of a program (see ``program.py``). Work is claimed in chunks from shared
counters, so that a thread that comes late does less, and one that never comes is not waited for.
"""

from __future__ import annotations

import numba

from matfact.kernels import blocks, csr, panels
from matfact.kernels.vectors import fetch_add, zeros

#: Digest of the modules inlined here. Numba compiles anew when this file changes, and only then.
SOURCES = "04e31e9941edc1f4"

CSR, KRONECKER, BANDS, SELECTION = range(4)
#: Columns of a program's steps. A unit is what a step can split its work into, for panels and for
#: single columns.
KIND, ROWS, PANEL_UNITS, VECTOR_UNITS, VALUES, COLUMNS, TABLE, A, B, C, D = range(11)
STEP_FIELDS = 11

WIDE, NARROW, DOT = 256, 64, 64  #: bytes of a panel's rows, and of the vectors of a dot product
SPACING = 8  #: counters between two that threads use: each has its own cache line


@numba.njit(inline="always")
def _arrive(posted, patience):  # type: ignore[no-untyped-def]
    """Count the call, unless as a helper, and return its number."""
    return fetch_add(posted, 0, 1) + 1 if patience == 0 else fetch_add(posted, 0, 0)


@numba.njit(inline="always")
def _linger(posted, call, patience):  # type: ignore[no-untyped-def]
    """Wait as a helper for the next call, as long as `patience` lasts.

    A thread that sleeps takes longer to wake than a small product takes, and one that returned
    would hold up the caller at Python's global lock.
    """
    while patience > 0 and fetch_add(posted, 0, 0) == call:
        patience -= 1


@numba.njit(inline="always")
def _panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    kind, at = step[KIND], step[TABLE]
    if kind == CSR:
        starts = table[at : at + step[ROWS] + 1]
        entries, columns = values[step[VALUES] :], indices[step[COLUMNS] :]
        csr.csr_panel(zero, entries, columns, starts, first, last, source, target)
    elif kind == KRONECKER:
        pattern = (step[A], step[B], step[C], step[D])
        blocks.kronecker_panel(
            zero, values, step[VALUES], pattern, first, last, source, target
        )  # fmt: skip
    elif kind == BANDS:
        tiles = table[at : at + 4 * step[PANEL_UNITS]].reshape(-1, 4)
        pieces = table[step[A] : step[B]].reshape(-1, 4)
        blocks.band_panel(zero, values, tiles, pieces, first, last, source, target)
    else:
        panels.select_panel(zero, table[at:], first, last, source, target)


@numba.njit(inline="always")
def _vector_step(step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    kind, at = step[KIND], step[TABLE]
    zero = zeros(source, DOT)
    if kind == CSR:
        starts = table[at : at + step[ROWS] + 1]
        entries, columns = values[step[VALUES] :], indices[step[COLUMNS] :]
        csr.csr_vector(zero, entries, columns, starts, first, last, source, target)
    elif kind == KRONECKER:
        pattern = (step[A], step[B], step[C], step[D])
        blocks.kronecker_vector(
            zero, values, step[VALUES], pattern, first, last, source, target
        )  # fmt: skip
    elif kind == BANDS:
        tiles = table[at : at + 4 * step[PANEL_UNITS]].reshape(-1, 4)
        pieces = table[step[A] : step[B]].reshape(-1, 4)
        blocks.band_vector(zero, values, tiles, pieces, first, last, source, target)
    else:
        panels.select_vector(table[at:], first, last, source, target)


@numba.njit(inline="always")
def _phase(zero, phase, program, columns, operands, part, scratch):  # type: ignore[no-untyped-def]
    """Do a part of a phase of one panel: pack, a step, or unpack.

    `columns` are the first column and the number of them.
    """
    steps, values, indices, table = program
    X, X_strides, out, out_strides = operands
    start, count = columns
    first, last = part
    half = len(scratch) // 2
    even, odd = scratch[:half], scratch[half:]
    source, target = (odd, even) if phase % 2 == 0 else (even, odd)
    if phase == 0:
        X = X[start * X_strides[1] :]
        panels.pack(zero, X, X_strides[0], X_strides[1], count, first, last, target)
    elif phase <= len(steps):
        step = steps[phase - 1]
        _panel_step(zero, step, values, indices, table, first, last, source, target)
    else:
        out = out[start * out_strides[1] :]
        panels.unpack(zero, source, first, last, count, out, out_strides[0], out_strides[1])


@numba.njit(inline="always")
def _panel_units(steps, phase, rows_in):  # type: ignore[no-untyped-def]
    """Return what a phase can be split into; packing and unpacking go row by row."""
    if phase == 0:
        return rows_in
    if phase > len(steps):
        return steps[-1, ROWS]
    return steps[phase - 1, PANEL_UNITS]


@numba.njit(inline="always")
def _chunk(chunk, begin, end, pieces, program, sizes, operands, memory):  # type: ignore[no-untyped-def]
    """Do the phases from `begin` to `end` of a chunk: a panel, or one of the `pieces` of one."""
    rows_in, batch, _, n_wide = sizes
    p, k = chunk // pieces, chunk % pieces
    X = operands[0]
    lanes, start = WIDE // X.itemsize, p * (WIDE // X.itemsize)
    if p >= n_wide:
        lanes = NARROW // X.itemsize
        start = n_wide * (WIDE // X.itemsize) + (p - n_wide) * lanes
    columns = (start, min(lanes, batch - start))
    for phase in range(begin, end):
        units = _panel_units(program[0], phase, rows_in)
        part = (units * k // pieces, units * (k + 1) // pieces)
        if p < n_wide:
            _phase(zeros(X, WIDE), phase, program, columns, operands, part, memory)
        else:
            _phase(zeros(X, NARROW), phase, program, columns, operands, part, memory)


@numba.njit(nogil=True, cache=True)
def apply_panels(program, sizes, operands, scratch, counters, pieces, posted, patience):  # type: ignore[no-untyped-def]
    """Apply all steps to panels.

    With 0 `pieces`, each thread takes whole panels through all phases, so that their activations
    stay in its core's own cache: rows of `scratch` belong to threads, which are counted too.
    Otherwise the rows of each phase are split into so many pieces, and rows of `scratch` belong
    to panels. Chunks of work claimed and done are counted, for each phase if they are split.

    `sizes` are rows of X, columns of X, panels, and how many of them are wide.
    """
    call = _arrive(posted, patience)
    n_phases = len(program[0]) + 2
    split = pieces > 0
    count = sizes[2] * max(1, pieces)
    thread = 0 if split else fetch_add(counters, 2 * SPACING, 1)
    for phase in range(n_phases if split else 1):
        begin, end = (phase, phase + 1) if split else (0, n_phases)
        claimed, done = 2 * SPACING * phase, 2 * SPACING * phase + SPACING
        while thread < len(scratch):
            chunk = fetch_add(counters, claimed, 1)
            if chunk >= count:
                break
            memory = scratch[chunk // pieces if split else thread]
            _chunk(chunk, begin, end, max(1, pieces), program, sizes, operands, memory)
            fetch_add(counters, done, 1)
        while fetch_add(counters, done, 0) < count:
            pass
    _linger(posted, call, patience)


@numba.njit(nogil=True, cache=True)
def apply_vector(program, operands, scratch, counters, pieces, posted, patience):  # type: ignore[no-untyped-def]
    """Apply all steps to a single column, which is read and written in place."""
    steps, values, indices, table = program
    X, _, out, _ = operands
    call = _arrive(posted, patience)
    for i in range(len(steps)):
        source = X if i == 0 else scratch[i % 2]
        target = out if i == len(steps) - 1 else scratch[(i + 1) % 2]
        units, claimed = steps[i, VECTOR_UNITS], 2 * SPACING * i
        while True:
            k = fetch_add(counters, claimed, 1)
            if k >= pieces:
                break
            first, last = units * k // pieces, units * (k + 1) // pieces
            _vector_step(steps[i], values, indices, table, first, last, source, target)
            fetch_add(counters, claimed + SPACING, 1)
        while fetch_add(counters, claimed + SPACING, 0) < pieces:
            pass
    _linger(posted, call, patience)
