"""Reading of regular files, up to a size limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading.

    Raises
    ------
    ValueError
        If it is not a regular file. Pipes and devices may block a reader forever.
    """
    # Without O_NONBLOCK, opening a pipe blocks until something writes to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError(f"{path} must be a regular file.")


def read_whole(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, or raise ``ValueError``."""
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > limit:
            raise ValueError(f"{path} must be a file of at most {limit} bytes.")
        return file.read(nbytes)
