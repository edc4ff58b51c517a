"""One pool of threads for all kernels that share their work.

Numba's own pools abort the process when two Python threads use them at once, or after a fork.
Here helpers sleep where there is nothing to do, and a caller never waits for one that does not
come: what no helper has begun, the caller does.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

_free: list[_Helper] = []  #: helpers that may be called
_helpers: list[_Helper] = []  #: all of them
_starting = threading.Lock()


class _Helper(threading.Thread):
    """A thread that makes one call after the other, and sleeps in between."""

    def __init__(self) -> None:
        super().__init__(name="matfact-helper", daemon=True)
        self._called = threading.Lock()
        self._called.acquire()

    def give(self, call: Callable[[], object], stays_free: bool) -> None:
        self._call, self._stays_free = call, stays_free
        self._called.release()

    def run(self) -> None:
        while True:
            self._called.acquire()
            call = self._call
            if self._stays_free:
                _free.append(self)
                call()
            else:
                call()
                del call, self._call  # which hold operands
                _free.append(self)


def lend(call: Callable[[], object], count: int, stays_free: bool = False) -> None:
    """Let at most `count` helpers make a call, where so many are free.

    More than `count` are not started. With `stays_free` they may be called for something else
    meanwhile, which they begin once they are done with this.
    """
    found: list[_Helper] = []
    while len(found) < count:
        try:
            found.append(_free.pop())
        except IndexError:
            helper = _started(count)
            if helper is None:
                break
            found.append(helper)
    for helper in found:
        helper.give(call, stays_free)


def _started(limit: int) -> _Helper | None:
    """Return a new helper, None where there are enough or the system has no thread for it."""
    if len(_helpers) >= limit:
        return None
    with _starting:
        if len(_helpers) >= limit:
            return None
        helper = _Helper()
        try:
            helper.start()
        except RuntimeError:  # also while the process ends
            return None
        _helpers.append(helper)
    return helper


def run(calls: Sequence[Callable[[], object]]) -> None:
    """Make all calls, here and on helpers that are free, and return when all are done."""
    if len(calls) == 1:  # as with small batches, which take little longer than what follows
        calls[0]()
        return
    left = deque(calls)
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        while left:
            try:
                call = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                call()
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    lend(work, len(calls) - 1)
    work()
    errors = [done.get() for _ in calls]
    for error in filter(None, errors):
        raise error


def _forget() -> None:
    """Start anew in a forked process, which has no other thread."""
    global _starting
    _free.clear()
    _helpers.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
