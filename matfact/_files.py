"""Atomic writing of files and folders.

Each is written under a partial name beside its target and then moved there. The writer holds a
lock on it, so that leftovers of killed processes can be recognized and removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where open files cannot be removed
    fcntl = None  # type: ignore[assignment]

#: Characters of a file's name used in its partial names, short enough for any encoding.
_SHOWN = 50
_PARTIAL = re.compile(rf"\.(.{{1,{_SHOWN}}})\.matfact-[0-9a-f]{{16}}\.part", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def write_atomically(path: str | Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file atomically: an existing file stays intact until the new one is complete.

    Parameters
    ----------
    path : str or Path
        The file. Links are followed. Mode and owner of an existing file are kept.
    content : bytes or iterable of bytes
        The content, or an iterable of its pieces, which need not fit in memory together.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If `path` exists and is not a regular file.
    """
    with replacing(_led_to(path)) as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def check_output(path: str | Path, inputs: Iterable[Path] = ()) -> None:
    """Check before the work starts that a file can be written, and raise otherwise.

    Parameters
    ----------
    path : str or Path
        The file to write.
    inputs : iterable of Path
        Files that are read; `path` must not be one of them.
    """
    target = _led_to(path)
    for file in inputs if target.exists() else ():
        if file.exists() and target.samefile(file):
            raise ValueError(f"{path} must differ from {file}, which is read.")
    with _partial(target, _earlier(target)):
        pass


def output_folder(path: str | Path) -> Path:
    """Return the folder `path`, with links followed, which must be new or empty.

    Leftovers of killed processes are removed.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and _may_be_replaced(target)):
        raise FileExistsError(f"path must name a new or empty folder, got {path}.")
    if target.parent.is_dir():
        remove_partial_files(target.parent, target.name)
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends without an error.

    Links are not followed: our folders contain none, and a planted one could redirect the write.
    """
    with _partial(path, _earlier(path)) as partial:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder that replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path, path.stat() if path.exists() else None, is_folder=True) as partial:
        yield partial
        os.replace(partial, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a file or folder until the block or the process ends.

    Does nothing on systems and file systems without locks.

    Raises
    ------
    BlockingIOError
        If another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def is_partial(name: str) -> bool:
    """Whether a file or folder has the name of a partial one."""
    return _PARTIAL.fullmatch(name) is not None


def remove_partial_files(folder: Path, name: str | None = None) -> None:
    """Remove leftovers of killed writers from `folder`, of the file `name` or of all files."""
    names: list[str] = []
    with contextlib.suppress(PermissionError):  # some folders are writable but cannot be listed
        names = os.listdir(folder)
    for each in names:
        match = _PARTIAL.fullmatch(each) if each[0] == "." else None
        if match is not None and (name is None or match[1] == name[:_SHOWN]):
            # Files still being written and files of other users stay.
            with contextlib.suppress(OSError), claimed(folder / each):
                _remove(folder / each)


@contextlib.contextmanager
def _partial(
    path: Path, earlier: os.stat_result | None, *, is_folder: bool = False
) -> Iterator[Path]:
    """Make a partial file or folder beside `path`, with the mode and owner of an existing one."""
    partial = path.with_name(f".{path.name[:_SHOWN]}.matfact-{secrets.token_hex(8)}.part")
    try:
        if is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        with claimed(partial):
            if earlier is not None:
                _make_alike(partial, earlier, path)
            yield partial
    finally:
        _remove(partial)


def _led_to(path: str | Path) -> Path:
    """Return the file `path`, with links followed, after removing leftovers beside it."""
    target = Path(os.path.realpath(path))
    _earlier(Path(path), os.stat)  # links in /proc may point to things without a name
    remove_partial_files(target.parent, target.name)
    return target


def _make_alike(partial: Path, earlier: os.stat_result, path: Path) -> None:
    """Give a new file the owner and mode of an existing one."""
    own, theirs = ((s.st_uid, s.st_gid) for s in (partial.stat(), earlier))
    if own != theirs:
        try:
            os.chown(partial, *theirs)
        except PermissionError:
            raise PermissionError(
                f"{path} belongs to another user or group, and a new file would not: remove it."
            ) from None
    partial.chmod(stat.S_IMODE(earlier.st_mode))


def _earlier(
    path: Path, status: Callable[[Path], os.stat_result] = os.lstat
) -> os.stat_result | None:
    """Return the status of `path`, None if it does not exist; raise if it may not be replaced."""
    try:
        found = status(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{path} must be a regular file, but it is {kind}.")
    if os.path.ismount(path) or not os.access(path, os.W_OK):
        raise PermissionError(f"{path} may not be replaced: it is write-protected or mounted.")
    return found


def _may_be_replaced(folder: Path) -> bool:
    return not os.path.ismount(folder) and not any(folder.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure, if the system can."""
    with contextlib.suppress(PermissionError):  # on Windows, or if it is not readable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
