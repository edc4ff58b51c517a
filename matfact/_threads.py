"""Thread counts of fits and kernels. Settings are restored afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numba
from threadpoolctl import ThreadpoolController

#: Matrix size from which several BLAS threads pay off. Below it, decompositions on two threads
#: of a busy machine took up to 80 times as long as on one, because threads spin while they wait.
LARGE = 1 << 22


class _Limits(threading.local):
    """Number of threads for kernels called from this thread, 0 for all."""

    threads = 0


_limits = _Limits()


def max_threads() -> int:
    """Return the maximum number of threads per product: ``NUMBA_NUM_THREADS``, or all cores."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def allowed_threads() -> int:
    """Return the number of threads a kernel called from this thread may use.

    Numba is not asked, since that would start its thread pool.
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
    """Limit BLAS to one thread while any thread is inside.

    The setting applies to the whole process. The first thread to enter saves it and the last to
    leave restores it.
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
    """Return the BLAS libraries of NumPy and SciPy, cached since the search is slow."""
    import scipy.linalg  # noqa: F401

    return ThreadpoolController().select(user_api="blas").lib_controllers


def _set_blas(counts: list[int]) -> None:
    for library, count in zip(_blas(), counts, strict=True):
        # Since version 3.8, threadpoolctl honours only the first thread that sets a count.
        allow_others = getattr(library, "clear_controlling_thread", lambda force: None)
        allow_others(force=True)
        library.set_num_threads(count)
        allow_others(force=True)


def fit_threads(n_entries: int) -> AbstractContextManager[None]:
    """Run BLAS on one thread for a small matrix; leave it as it is for a large one."""
    return _one_blas_thread if n_entries < LARGE else nullcontext()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run BLAS, OpenMP and the kernels on one thread.

    Parallel fits then share the cores without contention, and results do not depend on the number
    of threads, which affects how sums round. The OpenMP setting applies to this Python thread only.
    """
    openmp = ThreadpoolController().select(user_api="openmp")
    with limited_kernels(1), _one_blas_thread, openmp.limit(limits=1):
        yield
