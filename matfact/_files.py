"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: str | Path, content: bytes | Iterable[bytes]) -> None:
    """Write `content` to `path`; an earlier file stays whole until the new one is complete.

    Parameters
    ----------
    path : str or Path
        The file.
    content : bytes or iterable of bytes
        All of it, or its pieces in order, which need not fit in memory together.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove what writes into `folder` left behind when their process was killed."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power, where the system can."""
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
