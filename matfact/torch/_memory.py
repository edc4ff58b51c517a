"""Memory and threads that are kept, by C libraries above all, while nobody needs them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

#: That threads end and nothing else is lost, in terms of OpenMP.
_SOFT = 1
#: That pages are not needed soon: those of a file can be read again.
_DONTNEED = 4


def trim() -> None:
    """Give freed memory back to the system."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def rest() -> None:
    """End the workers that compute for this thread, and free buffers, until it goes on.

    A thread that computes has workers of its own, one for each core, and each of them some 2 MB of
    space for matrix products, and the kernels of factors some as well.
    """
    if (program := sys.modules.get("matfact.kernels.program")) is not None:
        program.free_scratch()
    if (free_buffers := _function("libtorch_cpu.so", "mkl_serv_thread_free_buffers")) is not None:
        free_buffers()
    if (pause := _function("libgomp.so.1", "omp_pause_resource_all")) is not None:
        pause(_SOFT)


def page_out(storages: list[weakref.ref[torch.UntypedStorage]]) -> None:
    """Take storages that are mapped from files out of memory until they are used."""
    storages[:] = [reference for reference in storages if reference() is not None]
    if (advise := _advise()) is None:
        return
    for reference in storages:
        if (storage := reference()) is not None:
            place, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
            advise(place, size, _DONTNEED)


@functools.cache
def _advise() -> Callable[..., object] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def _function(library: str, name: str) -> Callable[..., object] | None:
    """Return a function of a library that comes with torch, if it has been built like that."""
    with contextlib.suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library)), name)
    return None
