"""Journal of incomplete work, so that it can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from matfact._files import claimed, is_partial, remove_partial_files, replacing
from matfact._json import parse_json
from matfact._regular import read_whole
from matfact.checkpoint._manifest import DIGEST, JOURNAL, MANIFEST, Manifest, Shard
from matfact.checkpoint._shards import check_shard

#: Maximum size of a journal, in bytes, for as many files as a manifest may list.
_LONGEST = 1 << 26
#: Settings that differ, named in an error.
_SHOWN = 5


class Journal:
    """Work on one folder: new, resumed after a kill, or already complete.

    Each line holds a JSON object and its checksum: first the settings, then a shard per written
    file. A line truncated by a kill is ignored.

    Parameters
    ----------
    folder : Path
        The folder. It must be new or empty, or hold work that can be resumed.

    Attributes
    ----------
    finished : dict of str to Shard
        Complete files, by name.
    is_complete : bool
        Whether the manifest has been written, so that nothing is left to do.

    Raises
    ------
    ValueError
        If the folder holds anything else, or another process is working on it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[str, Shard] = {}
        self.is_complete = False
        self._held = contextlib.ExitStack()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} must be a folder, but is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        with self._held:  # released here if anything fails
            try:
                self._held.enter_context(claimed(folder))
            except BlockingIOError:
                raise ValueError(f"{folder} is being written by another process.") from None
            self._has_manifest = os.path.lexists(folder / MANIFEST)
            self._earlier, self._known = (
                self._of_manifest() if self._has_manifest else self._recorded()
            )
            self._held = self._held.pop_all()

    def take_up(self, settings: dict[str, Any]) -> None:
        """Find the finished files of the work with these settings, and start or resume it.

        Raises
        ------
        ValueError
            If the folder holds work with other settings.
        """
        is_worth = self._has_manifest or bool(self._known)  # else nothing would be lost
        if is_worth and self._earlier not in (None, settings):
            assert self._earlier is not None
            found = list(dict.fromkeys(_differences(self._earlier, settings)))
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"{self.folder} was begun with other options or weights: "
                f"{'; '.join(found[:_SHOWN])}{more}. Choose another folder, or remove it."
            )
        self._held.callback(self._tidy)
        remove_partial_files(self.folder)
        known = self._known if self._earlier == settings else ()
        self.finished = {s.file: s for s in known if _is_intact(self.folder, s)}
        self.is_complete = self._has_manifest and len(self.finished) == len(self._known)
        if not self.is_complete:
            self._begin(settings)

    def _of_manifest(self) -> tuple[dict[str, Any], tuple[Shard, ...]]:
        manifest = Manifest.read(self.folder)
        return manifest.settings, manifest.shards

    def _recorded(self) -> tuple[dict[str, Any] | None, tuple[Shard, ...]]:
        """Return the settings and recorded files of an earlier run."""
        content = b""
        with contextlib.suppress(FileNotFoundError, ValueError):
            content = read_whole(self.folder / JOURNAL, _LONGEST)
        lines = io.BytesIO(content)
        settings = _parsed(next(lines, b""))
        if settings is None:
            self._check_nothing_is_lost()
            return None, ()
        shards: dict[str, Shard] = {}
        for line in lines:
            if (fields := _parsed(line)) is None:
                break  # truncated by a kill
            with contextlib.suppress(ValueError):
                shard = Shard.from_json(fields)
                shards[shard.file] = shard
        return settings, tuple(shards.values())

    def _check_nothing_is_lost(self) -> None:
        """Raise unless the folder holds only a damaged journal and partial files."""
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL and not is_partial(entry.name):
                raise ValueError(
                    f"{self.folder} must be a new or empty folder, or hold work with an intact "
                    f"{JOURNAL}, but it holds {entry.name!r}. Choose another folder."
                )

    def _begin(self, settings: dict[str, Any]) -> None:
        """Rewrite the journal without truncated lines, and keep it open."""
        lines = [_line(settings), *(_line(shard.to_json()) for shard in self.finished.values())]
        with replacing(self.folder / JOURNAL) as file:
            file.writelines(lines)
        self._file: BinaryIO = self._held.enter_context((self.folder / JOURNAL).open("ab"))

    def add(self, shard: Shard) -> None:
        """Record a written file."""
        self.finished[shard.file] = shard
        self._file.write(_line(shard.to_json()))
        self._file.flush()
        os.fsync(self._file.fileno())

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest and remove the journal."""
        manifest.write(self.folder)
        self.is_complete = True

    def _tidy(self) -> None:
        """Remove temporary files, before others may work on the folder."""
        remove_partial_files(self.folder)  # left by killed workers
        if self.is_complete:
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.close()


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, or None if the line is truncated or invalid."""
    digest, _, text = line.removesuffix(b"\n").partition(b" ")
    if digest != hashlib.sha256(text).hexdigest().encode():
        return None
    with contextlib.suppress(ValueError):
        return parse_json(text)
    return None


def _is_intact(folder: Path, shard: Shard) -> bool:
    """Whether the file of a shard is intact."""
    try:
        check_shard(folder, shard)
    except ValueError:
        return False
    return True


def _differences(earlier: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """Yield the settings that differ, of parameters and files only those, without checksums."""
    for key in sorted({*earlier, *settings}):
        there, here = earlier.get(key), settings.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here)
        elif any(isinstance(each, str) and DIGEST.fullmatch(each) for each in (there, here)):
            yield f"other {key}"
        else:
            yield f"{key} was {there!r:.80} and is {here!r:.80}"
