"""Threads that help with a kernel, if they are free.

Numba's own thread pools abort the process when two Python threads use them at once, or after a
fork. Here a job is opened to helpers that watch for one, and nobody waits for one that does not
come.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from matfact.kernels import fused

Kernel = Callable[..., object]

_PATIENCE = 2_000  #: looks for another job before a helper sleeps, about half a millisecond
_NO_JOB = np.zeros(1, np.int64)
_state = np.zeros(fused.STATE_SIZE, np.int64)  #: what callers and helpers share
_kernels: dict[tuple[Any, ...], int] = {}  #: the number of each kernel compiled so far
_sleeping: list[threading.Lock] = []  #: what wakes each helper that sleeps
_turn = threading.Lock()  #: held by the one caller who has help
_calls = _helpers = 0


def enrolled(kernel: Kernel, arrays: tuple[np.ndarray, ...]) -> int:
    """Return the number by which helpers know a kernel for arrays of these dtypes."""
    key = (kernel, *(array.dtype for array in arrays))
    return _kernels.setdefault(key, len(_kernels))


def together(
    kernel: Kernel, number: int, job: np.ndarray, arrays: tuple[np.ndarray, ...], threads: int
) -> None:
    """Call a kernel that shares its work through counters, here and on free helpers.

    Parameters
    ----------
    kernel : callable
        ``kernel(job, *arrays, state, call, number, patience)`` of :mod:`matfact.kernels.fused`.
    number : int
        What `enrolled` has returned for it.
    job : ndarray of int64
        Where everything lies.
    arrays : tuple of ndarray
        What the kernel writes into the job, flat.
    threads : int
        Threads that should work, this one included.
    """
    global _calls, _helpers
    if threads == 1 or not _turn.acquire(blocking=False):
        kernel(job, *arrays, _state, 0, 0, 0)
        return
    try:
        _calls += 1
        while _helpers < threads - 1:
            _helpers += 1
            threading.Thread(target=_help, name="matfact-helper", daemon=True).start()
        for _ in range(min(threads - 1, len(_sleeping))):
            _sleeping.pop().release()
        kernel(job, *arrays, _state, _calls, number, 0)
    finally:
        _turn.release()


def _help() -> None:
    asleep = threading.Lock()
    asleep.acquire()
    while True:
        number = int(_state[fused.KERNEL])
        kernel, *dtypes = list(_kernels)[number]
        arrays = tuple(np.zeros(1, dtype) for dtype in dtypes)
        reason = kernel(_NO_JOB, *arrays, _state, 0, number, _PATIENCE)
        if number != _state[fused.KERNEL]:
            continue
        with _elsewhere(int(_state[fused.PROCESSOR])) as is_away:
            if reason != fused.IN_THE_WAY or not is_away:
                _sleeping.append(asleep)
                asleep.acquire()


@contextlib.contextmanager
def _elsewhere(processor: int) -> Iterator[bool]:
    """Keep this thread off a processor, and say whether that is possible.

    Threads that wake, or sit idle, are often put where their caller runs: together they would
    take longer there than the caller alone.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    others = allowed - {processor}
    if others:
        os.sched_setaffinity(0, others)
    yield bool(others)
    if others:
        os.sched_setaffinity(0, allowed)


def _forget() -> None:
    """Start anew in a forked process, which has no other thread."""
    global _turn, _helpers
    _state[:] = 0
    _sleeping.clear()
    _turn, _helpers = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
