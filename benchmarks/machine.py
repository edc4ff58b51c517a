"""The conditions of a measurement: threads, versions, silence."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from threadpoolctl import threadpool_info, threadpool_limits

from matfact._threads import limited_kernels
from matfact.compare._environment import environment

PEERS = ("torch", "pyfaust", "lazylinop")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run BLAS, OpenMP, the kernels and torch on `count` threads."""
    with ExitStack() as undo:
        undo.enter_context(limited_kernels(count))
        if is_installed("torch"):
            import torch

            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
        undo.enter_context(threadpool_limits(limits=count))
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Discard what compiled code prints to standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def is_installed(package: str) -> bool:
    """Whether the distribution `package` is installed."""
    return version(package) is not None


def version(package: str) -> str | None:
    """Return the installed version of a distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(threads: int) -> dict[str, object]:
    """Return machine and versions, with None for the peers that are not installed."""
    libraries = {
        f"{lib['internal_api']} {lib.get('version') or ''}".strip(): lib["num_threads"]
        for lib in threadpool_info()
    }
    peers = {name: version(name) for name in PEERS}
    return {**environment(), "peers": peers, "threads": threads, "thread_pools": libraries}
