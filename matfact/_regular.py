"""Opening what is to be read: regular files, of which no more is read than they may hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to be read.

    Raises
    ------
    ValueError
        If it is no regular file. Pipes and devices may hold a reader up for ever.
    """
    # Without O_NONBLOCK, a pipe is not even opened before somebody writes to it.
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
