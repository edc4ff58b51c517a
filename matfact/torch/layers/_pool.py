"""Work of compiled kernels on torch's own threads.

A second pool would compete for cores with torch's threads, which spin for a while after each
operation: text was then generated more slowly on two threads than on one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from matfact._threads import allowed_threads, limited_kernels
from matfact.kernels import threads

_is_forked = False  #: whether this process has lost the threads of the one it was forked from
_NAMES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")


@functools.cache
def _parallel_for() -> Callable[..., int] | None:
    """Return torch's function for parallel work, part of its stable interface for C since 2.10."""
    folder = Path(torch.__file__).parent / "lib"
    for path in filter(Path.is_file, map(folder.joinpath, _NAMES)):
        try:
            found: Any = ctypes.CDLL(str(path)).torch_parallel_for
        except (OSError, AttributeError):
            return None
        found.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
        return cast(Callable[..., int], found)
    return None


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@contextmanager
def on_torch_threads() -> Iterator[None]:
    """Let all kernels called from this thread run on torch's threads."""
    count = min(allowed_threads(), torch.get_num_threads())
    with threads.on(run), limited_kernels(count):
        yield


def run(calls: Sequence[Callable[[], object]]) -> None:
    """Run calls on this thread and torch's, or one after the other if torch is too old for it."""
    parallel_for = _parallel_for() if len(calls) > 1 and not _is_forked else None
    errors: list[BaseException] = []

    def work(first: int, last: int, _: object) -> None:
        try:
            for call in calls[first:last]:
                call()
        except BaseException as error:  # which must not leave a callback
            errors.append(error)

    if parallel_for is None:
        work(0, len(calls), None)
    else:
        _check(parallel_for(0, len(calls), 1, _Callback(work), None))
    for error in errors:
        raise error


def runner(kernel: Any, n_threads: int) -> Callable[[Any], None]:
    """Return a function that calls a kernel on up to `n_threads` threads, this one and torch's.

    Parameters
    ----------
    kernel : CFunc
        Result of `matfact.kernels.compilation.callback`, called once by each thread with a
        job: a ctypes array.
    n_threads : int
        Number of threads.
    """
    address = kernel.address
    parallel_for, alone = _parallel_for() if n_threads > 1 else None, _Callback(address)

    def run(job: Any) -> None:
        if parallel_for is None or _is_forked:
            alone(0, 1, job)
        else:
            _check(parallel_for(0, n_threads, 1, address, job))

    return run


def _check(error: int) -> None:
    if error:
        raise RuntimeError("torch could not run a kernel on its threads.")


def _after_fork() -> None:
    global _is_forked
    _is_forked = True  # torch's own parallel operations hang here, if it ran any before


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
