"""One thread for each fit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
from threadpoolctl import threadpool_limits


class _Limits(threading.local):
    """How many threads the kernels may use that this thread calls, 0 for all."""

    threads = 0


_limits = _Limits()


def max_threads() -> int:
    """Return how many threads may work on one product: ``NUMBA_NUM_THREADS``, or all cores."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def allowed_threads() -> int:
    """Return how many threads a kernel called from this thread may use.

    Numba is not asked, since that starts its own pool of threads.
    """
    return _limits.threads or max_threads()


@contextmanager
def limited_kernels(count: int) -> Iterator[None]:
    """Let kernels called from this Python thread use at most `count` threads."""
    outside = _limits.threads
    _limits.threads = min(count, max_threads())
    try:
        yield
    finally:
        _limits.threads = outside


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run BLAS, OpenMP and the kernels on one thread.

    Fits running side by side then share the cores without contention, and none depends on how
    many there are: sums split over threads round differently.
    """
    with limited_kernels(1), threadpool_limits(limits=1):
        yield
