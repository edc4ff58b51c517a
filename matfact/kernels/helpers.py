"""Threads that help with a kernel, if they are free.

Numba's own thread pools abort the process when two Python threads use them at once, or after a
fork. Here a call is offered to helpers that wait, and nobody waits for one that does not come.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]]] = queue.SimpleQueue()
_posted = np.zeros(1, np.int64)  #: calls offered so far, which helpers watch for a while
_PATIENCE = 20_000  #: looks at it, about 0.1 ms
_helpers: list[threading.Thread] = []
_starting = threading.Lock()


def max_threads() -> int:
    """Return how many threads may work on one product: ``NUMBA_NUM_THREADS``, or all cores."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def together(kernel: Callable[..., object], arguments: tuple[Any, ...], threads: int) -> None:
    """Call a kernel that shares its work through counters, here and on free helpers.

    Its last two arguments are the count of such calls, and for how long to watch it at the end
    (0 for the caller, who adds to it).
    """
    if threads == 1:
        kernel(*arguments, np.zeros(1, np.int64), 0)
        return
    if len(_helpers) < threads - 1:
        _start(threads - 1)
    for _ in range(threads - 1):
        _calls.put((kernel, arguments))
    kernel(*arguments, _posted, 0)
    with contextlib.suppress(queue.Empty):
        while not _calls.empty():
            _calls.get_nowait()  # or helpers would be busy with what is done already


def _start(count: int) -> None:
    with _starting:
        while len(_helpers) < count:
            helper = threading.Thread(target=_help, name="matfact-helper", daemon=True)
            helper.start()
            _helpers.append(helper)


def _help() -> None:
    while True:
        kernel, arguments = _calls.get()
        kernel(*arguments, _posted, _PATIENCE)
        del kernel, arguments  # which hold the caller's arrays


def _forget() -> None:
    """Start anew in a forked process, which has no other thread."""
    global _calls, _starting
    _helpers.clear()
    _calls, _starting = queue.SimpleQueue(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
