"""Memory and threads that are kept, by C libraries above all, while nobody needs them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

#: That threads end and nothing else is lost, in terms of OpenMP.
_SOFT = 1
#: That pages are not needed soon: those of a file can be read again.
_DONTNEED = 4


def trim() -> None:
    """Give freed memory back to the system."""
    if (malloc_trim := _of_process("malloc_trim")) is not None:
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


def page_out(storages: Iterable[torch.UntypedStorage]) -> None:
    """Take storages that are mapped from files out of memory until they are used."""
    if (advise := _of_process("madvise")) is not None:
        for storage in storages:
            place, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
            advise(place, size, _DONTNEED)


@functools.cache
def _of_process(name: str) -> Callable[..., object] | None:
    """Return a function of the C library, if it has one of this name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


@functools.cache
def _function(library: str, name: str) -> Callable[..., object] | None:
    """Return a function of a library that comes with torch, if it has been built like that."""
    with contextlib.suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), name)
    return None
