"""How many threads fits and kernels use; what is set for them is put back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numba
from threadpoolctl import ThreadpoolController

#: Entries from which the products of a fit pay for threads that may have to wait for one another.
#: Below, decompositions on two threads take up to 80 times as long as on one where other processes
#: keep the cores busy, as threads spin until the others are there.
LARGE = 1 << 22


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


class _OneBlasThread:
    """BLAS on one thread for as long as anyone is inside.

    Its setting is that of the whole process. The first to enter keeps what it was and the last to
    leave puts it back, in whichever order they come and go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._outside: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._outside = [library.num_threads for library in _blas()]
                _set_blas([1] * len(_blas()))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                _set_blas(self._outside)


_one_blas_thread = _OneBlasThread()


@functools.cache
def _blas() -> list[Any]:
    """Return the libraries of NumPy and SciPy, which take longer to find than a small fit."""
    import scipy.linalg  # noqa: F401

    return ThreadpoolController().select(user_api="blas").lib_controllers


def _set_blas(counts: list[int]) -> None:
    for library, count in zip(_blas(), counts, strict=True):
        # Since 3.8 threadpoolctl heeds only the thread that was the first to set a count.
        allow_others = getattr(library, "clear_controlling_thread", lambda force: None)
        allow_others(force=True)
        library.set_num_threads(count)
        allow_others(force=True)


def fit_threads(n_entries: int) -> AbstractContextManager[None]:
    """Run BLAS on one thread for a matrix of few entries, as it is set for a larger one."""
    return _one_blas_thread if n_entries < LARGE else nullcontext()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run BLAS, OpenMP and the kernels on one thread.

    Fits running side by side then share the cores without contention, and none depends on how
    many there are: sums split over threads round differently. The setting of OpenMP is that of
    this Python thread.
    """
    openmp = ThreadpoolController().select(user_api="openmp")
    with limited_kernels(1), _one_blas_thread, openmp.limit(limits=1):
        yield
