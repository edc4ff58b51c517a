"""What C libraries keep of memory and threads when they do not need it, for each thread anew."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

#: That threads end and nothing else is lost, in terms of OpenMP.
_SOFT = 1


def trim() -> None:
    """Give freed memory back to the system."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def rest() -> None:
    """End the workers that compute for this thread, and free buffers, until it goes on.

    A thread that computes has workers of its own, one for each core, and each of them some 2 MB of
    space for matrix products.
    """
    if (free_buffers := _function("libtorch_cpu.so", "mkl_serv_thread_free_buffers")) is not None:
        free_buffers()
    if (pause := _function("libgomp.so.1", "omp_pause_resource_all")) is not None:
        pause(_SOFT)


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def _function(library: str, name: str) -> Callable[..., object] | None:
    """Return a function of a library that comes with torch, if it has been built like that."""
    with contextlib.suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), name)
    return None
