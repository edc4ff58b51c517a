"""One thread for each fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
from threadpoolctl import threadpool_limits


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run BLAS, OpenMP and Numba on one thread.

    Fits running side by side then share the cores without contention, and none depends on how
    many there are: sums split over threads round differently.
    """
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        numba.set_num_threads(threads)
