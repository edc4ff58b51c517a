"""Environment of a result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba", "joblib")


def environment() -> dict[str, object]:
    """Return the date, the machine and the versions of packages."""
    from matfact import __version__

    versions = {"python": platform.python_version(), "matfact": __version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _cpu_name() -> str:
    """Return the model name of the processor, which Python provides only on some systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
