"""Compiling kernels: kept on disk where that can be, anew in each process elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """Return a decorator that compiles a function, which needs no lock of the interpreter.

    Parameters
    ----------
    **options : dict
        As those of :func:`numba.njit`, ``cache`` aside: compiled code is kept where Numba finds a
        folder for it, and what becomes of that folder costs time alone.
    """

    def decorate(function: Callable) -> Any:
        kernel = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError, OSError):  # there is no such folder
            kernel._cache = _Cache(function)
        return kernel

    return decorate


def _absolute(locator: Any) -> Any:
    """Return a locator of folders that do not depend on where a process was started.

    Without a home, or with a relative ``XDG_CACHE_HOME``, Numba would run code that anyone may
    have put into the current folder.
    """

    class Absolute(locator):
        def get_cache_path(self) -> str:
            path = super().get_cache_path()
            if not os.path.isabs(path):
                raise OSError(f"not an absolute path: {path}")
            return path

    return Absolute


class _Folder(CompileResultCacheImpl):
    _locator_classes = [_absolute(locator) for locator in CompileResultCacheImpl._locator_classes]  # noqa: RUF012


class _Cache(FunctionCache):
    """Numba's cache of a function, where a damaged, full or vanished one is an empty one."""

    _impl_class = _Folder

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # unpickling damaged bytes may raise any
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *arguments: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(*arguments)
