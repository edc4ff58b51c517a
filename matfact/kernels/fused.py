"""Application of all factors of a product in one call, with several threads.

Each factor is a step of a program (see ``program.py``), and each call is a job: an array with the
addresses of program and operands, which helper threads read in compiled code without the GIL.
Threads claim chunks of work from counters in the job. A late thread does less work, and nobody
waits for a thread that never comes.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from matfact.kernels import blocks, coded, csr, panels, threads
from matfact.kernels.atomics import fetch_add, give_way, look, pointer, publish
from matfact.kernels.compilation import compiled
from matfact.kernels.vectors import zeros

#: Digest of the modules inlined here. Numba compiles anew when this file changes, and only then.
SOURCES = "ce45c9ca1ee65424"

#: Kinds of steps; programs of bytes have those of ``coded`` instead, and selections.
CSR, KRONECKER, BANDS, SELECTION = range(4)
#: Columns of a program's steps. A unit is the smallest part of a step's work, for panels and for
#: single columns. Kronecker-sparse steps store the number of interleaved blocks instead of a table.
KIND, ROWS, PANEL_UNITS, VECTOR_UNITS, VALUES, COLUMNS, TABLE, A, B, C, D = range(11)
STEP_FIELDS = 11

#: Fields of a job: addresses and sizes of the program's arrays, of operands and of scratch space.
STEPS, N_STEPS, VALUE_DATA, INDEX_DATA, TABLE_DATA = range(5)
X_DATA, X_ROW, X_COLUMN, OUT_DATA, OUT_ROW, OUT_COLUMN = range(5, 11)
SCRATCH, SCRATCH_ROWS, SCRATCH_SIZE = range(11, 14)
#: Rows of X, columns of X, panels, how many of them are wide, and parts of a phase.
ROWS_IN, BATCH, PANELS, WIDE_PANELS, PIECES = range(14, 19)
COUNTERS = 24

#: Fields of the shared state: the number of the open job (0 if none), how many helpers are in it,
#: its address, and its kernel.
OPEN, INSIDE, JOB, KERNEL = 0, 8, 16, 17
STATE_SIZE = 24

WIDE, NARROW, DOT = 256, 64, 64  #: bytes of a panel's rows, and of the vectors of a dot product
SPACING = 8  #: distance of counters, so that each has its own cache line
_SPIN = 100_000  #: reads of a counter before yielding: a busy core takes long to give a thread back
_FAR = 1 << 60  #: placeholder size of arrays with bounds known otherwise
_PATIENCE = 2_000  #: polls for another job before a helper sleeps, about half a millisecond

Kernel = Callable[..., object]

_NO_JOB = np.zeros(1, np.int64)
_state = np.zeros(STATE_SIZE, np.int64)  #: shared by callers and helpers
_kernels: dict[tuple[Any, ...], int] = {}  #: the number of each kernel compiled so far
_turn = threading.Lock()  #: held by the caller that uses the helpers
_calls = 0


@numba.njit(inline="always")
def _array(job, place, like):  # type: ignore[no-untyped-def]
    return numba.carray(pointer(job[place], like), (_FAR,))


@numba.njit(inline="always")
def _await(job, place, count):  # type: ignore[no-untyped-def]
    """Wait until a counter has reached `count`."""
    spins = 0
    while look(job, place) < count:
        spins += 1
        if spins > _SPIN:
            give_way()


@numba.njit(inline="always")
def _begin(job, X, out, scratch, state, call, kernel):  # type: ignore[no-untyped-def]
    """Store the addresses of a caller's arrays, and open the job to helpers if it has a number."""
    job[X_DATA], job[OUT_DATA] = X.ctypes.data, out.ctypes.data
    job[SCRATCH] = scratch.ctypes.data
    if call > 0:
        state[JOB], state[KERNEL] = job.ctypes.data, kernel
        publish(state, OPEN, call)


@numba.njit(inline="always")
def _end(state, call):  # type: ignore[no-untyped-def]
    """Close the job and wait until all helpers have left it."""
    if call > 0:
        publish(state, OPEN, 0)
        spins = 0
        while look(state, INSIDE) > 0:
            spins += 1
            if spins > _SPIN:
                give_way()


@numba.njit(inline="always")
def _next(state, seen, kernel, patience):  # type: ignore[no-untyped-def]
    """Wait as a helper for another job and enter it; return its number, or 0 to go to sleep.

    Helpers poll for a while first, since waking a thread takes longer than a small product.
    """
    for _ in range(patience):
        number = look(state, OPEN)
        if number > 0 and number != seen:
            fetch_add(state, INSIDE, 1)
            if look(state, OPEN) == number and state[KERNEL] == kernel:
                return number
            fetch_add(state, INSIDE, -1)
            if look(state, KERNEL) != kernel:
                return 0
        give_way()
    return 0


@numba.njit(inline="always")
def _panel_step(zero, step, values, indices, table, first, last, source, target):  # type: ignore[no-untyped-def]
    kind, at = step[KIND], step[TABLE]
    if kind == CSR:
        slices = table[at : step[A]].reshape(-1, 3)
        order, ends = table[step[A] : step[B]], table[step[B] :]
        entries, columns = values[step[VALUES] :], indices[step[COLUMNS] :]
        csr.csr_panel(
            zero, entries, columns, slices, step[C], order, ends, first, last, source, target
        )  # fmt: skip
    elif kind == KRONECKER:
        pattern = (step[A], step[B], step[C], step[D])
        entries = values[step[VALUES] :]
        blocks.kronecker_panel(zero, entries, at, pattern, first, last, source, target)
    elif kind == BANDS:
        tiles = table[at : at + 4 * step[PANEL_UNITS]].reshape(-1, 4)
        pieces = table[step[A] : step[B]].reshape(-1, 4)
        blocks.band_panel(zero, values, tiles, pieces, first, last, source, target)
    else:
        panels.select_panel(zero, table[at:], first, last, source, target)


@numba.njit(inline="always")
def _vector_step(step, values, indices, table, part, source, target):  # type: ignore[no-untyped-def]
    kind, at = step[KIND], step[TABLE]
    first, last = part
    zero = zeros(source, DOT)
    if kind == CSR:
        slices = table[at : step[A]].reshape(-1, 3)
        order, ends = table[step[A] : step[B]], table[step[B] :]
        entries, columns = values[step[VALUES] :], indices[step[COLUMNS] :]
        csr.csr_vector(
            zero, entries, columns, slices, step[C], order, ends, first, last, source, target
        )  # fmt: skip
    elif kind == KRONECKER:
        pattern = (step[A], step[B], step[C], step[D])
        entries, places = values[step[VALUES] :], indices[step[COLUMNS] :]
        blocks.kronecker_vector(
            zero, entries, places, at, pattern, first, last, source, target
        )  # fmt: skip
    elif kind == BANDS:
        tiles = table[at : at + 4 * step[PANEL_UNITS]].reshape(-1, 4)
        pieces = table[step[A] : step[B]].reshape(-1, 4)
        blocks.band_vector(zero, values, tiles, pieces, first, last, source, target)
    else:
        panels.select_vector(table[at:], first, last, source, target)


@numba.njit(inline="always")
def _phase(do, zero, phase, job, program, X, out, columns, part, scratch):  # type: ignore[no-untyped-def]
    """Do a part of a phase of one panel: pack, a step, or unpack.

    Steps are left to the function `do`. `columns` are the first column and the number of them.
    """
    steps, values, indices, table = program
    start, count = columns
    first, last = part
    half = len(scratch) // 2
    even, odd = scratch[:half], scratch[half:]
    source, target = (odd, even) if phase % 2 == 0 else (even, odd)
    if phase == 0:
        X = X[start * job[X_COLUMN] :]
        panels.pack(zero, X, job[X_ROW], job[X_COLUMN], count, first, last, target)
    elif phase <= len(steps):
        step = steps[phase - 1]
        do(zero, step, values, indices, table, first, last, source, target)
    else:
        out = out[start * job[OUT_COLUMN] :]
        panels.unpack(zero, source, first, last, count, out, job[OUT_ROW], job[OUT_COLUMN])


@numba.njit(inline="always")
def _panel_units(steps, phase, rows_in):  # type: ignore[no-untyped-def]
    """Return the number of units of a phase; packing and unpacking have one per row."""
    if phase == 0:
        return rows_in
    if phase > len(steps):
        return steps[-1, ROWS]
    return steps[phase - 1, PANEL_UNITS]


@numba.njit(inline="always")
def _chunk(do, chunk, begin, end, pieces, job, program, X, out, memory):  # type: ignore[no-untyped-def]
    """Do the phases from `begin` to `end` of a chunk: a panel, or one of the `pieces` of one."""
    p, k = chunk // pieces, chunk % pieces
    n_wide = job[WIDE_PANELS]
    lanes, start = WIDE // X.itemsize, p * (WIDE // X.itemsize)
    if p >= n_wide:
        lanes = NARROW // X.itemsize
        start = n_wide * (WIDE // X.itemsize) + (p - n_wide) * lanes
    columns = (start, min(lanes, job[BATCH] - start))
    for phase in range(begin, end):
        units = _panel_units(program[0], phase, job[ROWS_IN])
        part = (units * k // pieces, units * (k + 1) // pieces)
        if p < n_wide:
            _phase(do, zeros(X, WIDE), phase, job, program, X, out, columns, part, memory)
        else:
            _phase(do, zeros(X, NARROW), phase, job, program, X, out, columns, part, memory)


@numba.njit(inline="always")
def _read(job, values, indices, X):  # type: ignore[no-untyped-def]
    """Return program, operands and scratch space of a job, with the dtypes of the given arrays."""
    steps = numba.carray(pointer(job[STEPS], job), (job[N_STEPS], STEP_FIELDS))
    program = (
        steps, _array(job, VALUE_DATA, values), _array(job, INDEX_DATA, indices),
        _array(job, TABLE_DATA, job),
    )  # fmt: skip
    scratch = numba.carray(pointer(job[SCRATCH], X), (job[SCRATCH_ROWS], job[SCRATCH_SIZE]))
    return program, _array(job, X_DATA, X), _array(job, OUT_DATA, X), scratch


@numba.njit(inline="always")
def apply_to_panels(do, job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply all steps to panels, as a caller of a job or, with some patience, as a helper of any.

    With 0 pieces, each thread takes whole panels through all phases, so that activations stay in
    its core's cache; rows of the scratch space belong to threads. Otherwise the rows of each phase
    are split into that many pieces, and rows of the scratch space belong to panels. Claimed and
    finished chunks are counted, per phase if phases are split.
    """
    if patience == 0:
        _begin(job, X, out, scratch, state, call, kernel)
    seen = 0
    while True:
        if patience > 0:
            seen = _next(state, seen, kernel, patience)
            if seen == 0:
                break
            job = _array(state, JOB, job)
        program, source, target, memory = _read(job, values, indices, X)
        n_phases = len(program[0]) + 2
        split = job[PIECES] > 0
        pieces = max(1, job[PIECES])
        count = job[PANELS] * pieces
        thread = 0 if split else fetch_add(job, COUNTERS + 2 * SPACING, 1)
        for phase in range(n_phases if split else 1):
            begin, end = (phase, phase + 1) if split else (0, n_phases)
            claimed = COUNTERS + 2 * SPACING * phase
            while thread < len(memory):
                chunk = fetch_add(job, claimed, 1)
                if chunk >= count:
                    break
                own = memory[chunk // pieces if split else thread]
                _chunk(do, chunk, begin, end, pieces, job, program, source, target, own)
                fetch_add(job, claimed + SPACING, 1)
            if split or patience == 0:
                _await(job, claimed + SPACING, count)
        if patience == 0:
            break
        fetch_add(state, INSIDE, -1)
    _end(state, call)


@numba.njit(inline="always")
def apply_to_vector(do, job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply all steps to a single column, which is read and written in place."""
    if patience == 0:
        _begin(job, X, out, scratch, state, call, kernel)
    seen = 0
    while True:
        if patience > 0:
            seen = _next(state, seen, kernel, patience)
            if seen == 0:
                break
            job = _array(state, JOB, job)
        (steps, entries, positions, table), first, last, memory = _read(job, values, indices, X)
        pieces = job[PIECES]
        for i in range(len(steps)):
            source = first if i == 0 else memory[i % 2]
            target = last if i == len(steps) - 1 else memory[(i + 1) % 2]
            units, claimed = steps[i, VECTOR_UNITS], COUNTERS + 2 * SPACING * i
            while True:
                k = fetch_add(job, claimed, 1)
                if k >= pieces:
                    break
                part = (units * k // pieces, units * (k + 1) // pieces)
                do(steps[i], entries, positions, table, part, source, target)
                fetch_add(job, claimed + SPACING, 1)
            _await(job, claimed + SPACING, pieces)
        if patience == 0:
            break
        fetch_add(state, INSIDE, -1)
    _end(state, call)


@compiled()
def apply_panels(job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply steps of numbers to panels."""
    apply_to_panels(
        _panel_step, job, values, indices, X, out, scratch, state, call, kernel, patience
    )  # fmt: skip


@compiled()
def apply_vector(job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply steps of numbers to a single column."""
    apply_to_vector(
        _vector_step, job, values, indices, X, out, scratch, state, call, kernel, patience
    )  # fmt: skip


@compiled()
def apply_codes_to_panels(job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply steps of bytes to panels."""
    apply_to_panels(
        coded.panel_step, job, values, indices, X, out, scratch, state, call, kernel, patience
    )  # fmt: skip


@compiled()
def apply_codes_to_vector(job, values, indices, X, out, scratch, state, call, kernel, patience):  # type: ignore[no-untyped-def]
    """Apply steps of bytes to a single column."""
    apply_to_vector(
        coded.vector_step, job, values, indices, X, out, scratch, state, call, kernel, patience
    )  # fmt: skip


def enroll(kernel: Kernel, arrays: tuple[np.ndarray, ...]) -> int:
    """Return the number that identifies a kernel for arrays of these dtypes."""
    key = (kernel, *(array.dtype for array in arrays))
    return _kernels.setdefault(key, len(_kernels))


def run(
    kernel: Kernel, number: int, job: np.ndarray, arrays: tuple[np.ndarray, ...], n_threads: int
) -> None:
    """Call a kernel of this module in this thread and on free helpers.

    Parameters
    ----------
    kernel : callable
        ``kernel(job, *arrays, state, call, number, patience)``.
    number : int
        Result of `enroll` for this kernel.
    job : ndarray of int64
        The job, with the addresses of all arrays.
    arrays : tuple of ndarray
        Flat arrays, whose addresses the kernel writes into the job.
    n_threads : int
        Number of threads, including this one.
    """
    global _calls
    if n_threads > 1 and threads.place.pool is not None:
        call = functools.partial(kernel, job, *arrays, _state, 0, 0, 0)
        threads.place.pool([call] * n_threads)
        return
    if n_threads == 1 or not _turn.acquire(blocking=False):
        kernel(job, *arrays, _state, 0, 0, 0)
        return
    try:
        _calls += 1
        threads.lend(_watch, n_threads - 1, stays_free=True)
        kernel(job, *arrays, _state, _calls, number, 0)
    finally:
        _turn.release()


def _watch() -> None:
    """Help with jobs until none arrives for a while."""
    number = -1
    while number != _state[KERNEL]:  # again if the last job needed another kernel
        number = int(_state[KERNEL])
        kernel, *dtypes = list(_kernels)[number]
        arrays = tuple(np.zeros(1, dtype) for dtype in dtypes)
        kernel(_NO_JOB, *arrays, _state, 0, number, _PATIENCE)


def _forget() -> None:
    """Reset the state in a forked process, which has no helpers."""
    global _turn
    _state[:] = 0
    _turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
