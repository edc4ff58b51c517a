"""The thread pool of all parallel kernels.

Numba's own pools abort the process if two Python threads use them at once, or after a fork. Helpers
of this pool sleep when idle. A caller never waits for a helper that does not come, but runs the
calls that no helper has started.

Threads of several pools compete for cores. Code that alternates with another library's parallel
operations gives that library's pool in its place.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

_free: list[_Helper] = []  #: idle helpers
_helpers: list[_Helper] = []  #: all helpers
_starting = threading.Lock()


Pool = Callable[[Sequence[Callable[[], object]]], None]  #: runs calls on several threads


class _Place(threading.local):
    """The pool for kernels called from this thread, None for the helpers."""

    pool: Pool | None = None


place = _Place()


@contextmanager
def on(pool: Pool) -> Iterator[None]:
    """Let kernels called from this thread run on another pool."""
    outside, place.pool = place.pool, pool
    try:
        yield
    finally:
        place.pool = outside


class _Helper(threading.Thread):
    """Thread that runs calls one after the other and sleeps in between."""

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
                del call, self._call  # they hold operands
                _free.append(self)


def lend(call: Callable[[], object], count: int, stays_free: bool = False) -> None:
    """Let up to `count` free helpers run a call.

    At most `count` helpers are started in total. With `stays_free` they accept another call
    meanwhile and run it when they have finished this one.
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
    """Return a new helper, or None if there are enough or no thread can be started."""
    if len(_helpers) >= limit:
        return None
    with _starting:
        if len(_helpers) >= limit:
            return None
        helper = _Helper()
        try:
            helper.start()
        except RuntimeError:  # also at interpreter shutdown
            return None
        _helpers.append(helper)
    return helper


def run(calls: Sequence[Callable[[], object]]) -> None:
    """Run all calls in this thread and on free helpers, and return when all are done."""
    if len(calls) == 1:  # fast path for small batches
        calls[0]()
        return
    if place.pool is not None:
        place.pool(calls)
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
    """Reset the pool in a forked process, which has no other thread."""
    global _starting
    _free.clear()
    _helpers.clear()
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
