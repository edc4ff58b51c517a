"""What was measured on this machine, kept in the user's cache folder for later processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numpy as np
from threadpoolctl import threadpool_info

from matfact import __version__
from matfact._files import write_atomically
from matfact._threads import max_threads
from matfact.kernels import fused

T = TypeVar("T")

_PROVISIONAL = 3600.0  #: seconds for which a measurement counts that other work may have disturbed
_FOREVER = 1e300  #: seconds; JSON has no infinity


def recall(name: str, measure: Callable[[], tuple[T, bool]], is_valid: Callable[[Any], bool]) -> T:
    """Return what was measured under a name, now if no process on this machine did before.

    Parameters
    ----------
    name : str
        What is measured.
    measure : callable
        Returns what can be written as JSON, and whether that was undisturbed. Otherwise, or on a
        busy machine, it is measured again after an hour.
    is_valid : callable
        Whether something read from the file is such a measurement.
    """
    if name not in _known():
        _known().update(_read())  # perhaps another process was here meanwhile
    value = _unexpired(_known().get(name))
    if is_valid(value):
        return value
    busy = _is_busy()
    value, undisturbed = measure()
    is_final = undisturbed and not (busy or _is_busy())
    until = _FOREVER if is_final else time.time() + _PROVISIONAL
    _known()[name] = {"value": value, "until": until}
    _write()
    return value


def _unexpired(entry: Any) -> Any:
    """Return the value of an entry that still counts, otherwise None."""
    if isinstance(entry, dict) and isinstance(entry.get("until"), float):
        return entry.get("value") if entry["until"] > time.time() else None
    return None


@functools.cache
def _known() -> dict[str, Any]:
    """Return what this process knows of, by name."""
    return {}


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(_file().read_text())
        if isinstance(stored, dict):
            return stored
    return {}


def _write() -> None:
    path = _file()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time, not results
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_read() | _known()).encode())


def _is_busy() -> bool:
    """Whether more programs than processors want to run, where the system can tell."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _file() -> Path:
    return _cache_folder() / f"times-{_machine()}.json"


def _cache_folder() -> Path:
    """Return the user's folder for what can be computed again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "matfact"


@functools.cache
def _machine() -> str:
    """Return a name for what times depend on: processor, threads, versions and kernels."""
    pools = [(lib["prefix"], lib["version"], lib["num_threads"]) for lib in threadpool_info()]
    processor = (platform.node(), llvmlite.binding.get_host_cpu_name(), os.cpu_count())
    versions = (np.__version__, version("numba"), __version__, fused.SOURCES)
    parts = (processor, max_threads(), sorted(map(str, pools)), versions)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
