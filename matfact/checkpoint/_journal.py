"""The record of work that is not complete, so that it can be taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from matfact._files import remove_partial_files, write_atomically
from matfact._json import parse_json
from matfact._regular import read_whole
from matfact.checkpoint._manifest import MANIFEST, Manifest, Shard
from matfact.checkpoint._shards import check_shard

JOURNAL = "journal.log"
#: Longest record read, in bytes: that of as many files as a manifest may name.
_LONGEST = 1 << 26


class Journal:
    """Work on one folder: begun, taken up again after a kill, or found complete.

    Each line is the checksum of a JSON object and the object: first the settings, then a shard
    for each file that has been written. A line cut short by a kill counts as not written.

    Parameters
    ----------
    folder : Path
        Where the work is done. It must be new or empty, or hold work with the same settings.
    settings : dict
        What determines the result.

    Attributes
    ----------
    finished : dict of str to Shard
        Files that are complete, by name.
    is_complete : bool
        Whether the manifest has been written and nothing is left to be done.

    Raises
    ------
    ValueError
        If the folder holds anything else, or another process is at work on it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.finished: dict[str, Shard] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._file: BinaryIO | None = None
        try:
            self.is_complete = (folder / MANIFEST).exists()
            earlier = Manifest.read(folder).settings if self.is_complete else self._recover()
            if earlier not in (None, settings):
                raise ValueError(
                    f"{folder} was begun with other options or weights: "
                    f"{_differences(earlier, settings)}. Choose another folder, or remove it."
                )
            remove_partial_files(folder)
            if not self.is_complete:
                self._begin(settings)
        except BaseException:
            self.close()
            raise

    def _recover(self) -> dict[str, Any] | None:
        """Read what an earlier run recorded, and return its settings."""
        path = self.folder / JOURNAL
        if not path.exists():
            if any(not entry.name.endswith(".part") for entry in self.folder.iterdir()):
                raise ValueError(f"{self.folder} must be a new or an empty folder.")
            return None
        first, *lines = [_parsed(line) for line in read_whole(path, _LONGEST).split(b"\n")]
        if first is None:
            raise ValueError(f"{path} is damaged; remove {self.folder} to begin again.")
        for line in lines:
            if line is not None and (shard := _intact(self.folder, line)):
                self.finished[shard.file] = shard
        return first

    def _begin(self, settings: dict[str, Any]) -> None:
        """Write what is known anew, without torn lines, and keep the file open."""
        lines = [_line(settings), *(_line(shard.to_json()) for shard in self.finished.values())]
        write_atomically(self.folder / JOURNAL, b"".join(lines))
        self._file = (self.folder / JOURNAL).open("ab")

    def add(self, shard: Shard) -> None:
        """Record a file that has been written."""
        assert self._file is not None
        self.finished[shard.file] = shard
        self._file.write(_line(shard.to_json()))
        self._file.flush()
        os.fsync(self._file.fileno())

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest; the record is of no use any more."""
        manifest.write(self.folder)
        remove_partial_files(self.folder)  # left by workers that were killed
        self.is_complete = True

    def close(self) -> None:
        """Let others work on the folder."""
        if self._file is not None:
            self._file.close()
        if self.is_complete:
            (self.folder / JOURNAL).unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object, or None where the line is not whole."""
    digest, _, text = line.partition(b" ")
    if digest != hashlib.sha256(text).hexdigest().encode():
        return None
    return parse_json(text)


def _intact(folder: Path, fields: dict[str, Any]) -> Shard | None:
    """Return the shard if its file is as it was written."""
    try:
        shard = Shard.from_json(fields)
        check_shard(folder, shard)
    except ValueError:
        return None
    return shard


def _differences(earlier: dict[str, Any], settings: dict[str, Any]) -> str:
    keys = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
    return "; ".join(f"{k} was {earlier.get(k)!r} and is {settings.get(k)!r}" for k in keys)


def _locked(folder: Path) -> int | None:
    """Claim the folder until the returned descriptor is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ValueError(f"{folder} is being written by another process.") from None
    return descriptor
