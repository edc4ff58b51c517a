"""Compilation of kernels, cached on disk if possible."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.np.numpy_support import from_dtype


def compiled(**options: Any) -> Callable[[Callable], Any]:
    """Return a decorator that compiles a function and releases the GIL.

    Parameters
    ----------
    **options : dict
        Options of `numba.njit` except ``cache``. Compiled code is cached if Numba finds a
        folder for it; losing the folder only costs time.
    """

    def decorate(function: Callable) -> Any:
        kernel = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError, OSError):  # no such folder
            kernel._cache = _Cache(function)
        return kernel

    return decorate


def callback(function: Callable, dtype: Any) -> CFunc:
    """Return a compiled function of C that does parts of some work.

    Parameters
    ----------
    function : callable
        ``function(first, last, data)``: the parts, and a pointer typed by `dtype` to what they
        need.
    dtype : data-type
        Selects the code.
    """
    pointer = types.CPointer(from_dtype(np.dtype(dtype)))
    made: Any = CFunc(function, ((types.int64, types.int64, pointer), types.void), {}, {})
    with contextlib.suppress(RuntimeError, OSError):  # no folder for it
        made._cache = _Cache(function)
    made.compile()
    return made


def _absolute(locator: Any) -> Any:
    """Return a cache locator that accepts absolute paths only.

    Without a home, or with a relative ``XDG_CACHE_HOME``, Numba would run code from the current
    folder, where anyone may have put it.
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
    """Numba's cache of a function; a damaged, full or missing cache counts as empty."""

    _impl_class = _Folder

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # unpickling damaged bytes may raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *arguments: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(*arguments)
