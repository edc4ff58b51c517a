"""Files and folders that are written whole or not at all, and only where they may be.

Each is written beside its place, under a name that tells whose it is, and then moved there. Its
writer holds a lock on it, so that what a killed process left behind can be told and removed.
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
except ImportError:  # Windows, where files that are open cannot be removed
    fcntl = None  # type: ignore[assignment]

#: Characters of the name of a file that those of its partial ones hold: room for any encoding.
_SHOWN = 50
_PARTIAL = re.compile(rf"\.(.{{1,{_SHOWN}}})\.matfact-[0-9a-f]{{16}}\.part", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def write_atomically(path: str | Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file that a user names; an earlier one stays whole until the new one is complete.

    Parameters
    ----------
    path : str or Path
        The file. Where it is a link, what it leads to is written. Mode and owner of an earlier
        file are kept.
    content : bytes or iterable of bytes
        All of it, or its pieces in order, which need not fit in memory together.

    Raises
    ------
    OSError
        If the file may not be written.
    ValueError
        If what stands there is no regular file.
    """
    with replacing(_led_to(path)) as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def check_output(path: str | Path, inputs: Iterable[Path] = ()) -> None:
    """Raise before the work what writing a file would raise after it.

    Parameters
    ----------
    path : str or Path
        The file to be written.
    inputs : iterable of Path
        Files to be read, none of which may be `path`.
    """
    target = _led_to(path)
    for file in inputs if target.exists() else ():
        if file.exists() and target.samefile(file):
            raise ValueError(f"{path} must be another file than {file}, which is read.")
    with _partial(target, _earlier(target)):
        pass


def output_folder(path: str | Path) -> Path:
    """Return the folder that `path` leads to, which must be new or empty.

    What killed processes left behind of it is removed.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and _may_be_replaced(target)):
        raise FileExistsError(f"path must name a new or an empty folder, got {path}.")
    if target.parent.is_dir():
        remove_partial_files(target.parent, target.name)
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block is left without an error.

    A link is not followed: in folders of ours there is none, and whoever put one there could have
    us write elsewhere.
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
    """Make a folder that takes the place of `path` when the block is left without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path, path.stat() if path.exists() else None, is_folder=True) as partial:
        yield partial
        os.replace(partial, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a file or folder until the block is left or the process ends.

    Systems and file systems without locks let everyone in.

    Raises
    ------
    BlockingIOError
        If somebody else has it.
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
    """Whether a file or folder is called as those that are being written."""
    return _PARTIAL.fullmatch(name) is not None


def remove_partial_files(folder: Path, name: str | None = None) -> None:
    """Remove what writes into `folder`, of the file `name` or all, left when they were killed."""
    names: list[str] = []
    with contextlib.suppress(PermissionError):  # some folders can be written to and not listed
        names = os.listdir(folder)
    for each in names:
        match = _PARTIAL.fullmatch(each) if each[0] == "." else None  # folders may be large
        if match is not None and (name is None or match[1] == name[:_SHOWN]):
            # What is still being written, or is another user's, stays.
            with contextlib.suppress(OSError), claimed(folder / each):
                _remove(folder / each)


@contextlib.contextmanager
def _partial(
    path: Path, earlier: os.stat_result | None, *, is_folder: bool = False
) -> Iterator[Path]:
    """Make a file or folder beside `path`, with the mode and owner of what stands there."""
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
    """Return the file that a user names, links followed; what was left beside it is removed."""
    target = Path(os.path.realpath(path))
    _earlier(Path(path), os.stat)  # what links in /proc lead to need have no name
    remove_partial_files(target.parent, target.name)
    return target


def _make_alike(partial: Path, earlier: os.stat_result, path: Path) -> None:
    """Give a new file the owner and mode of an earlier one."""
    own, theirs = ((s.st_uid, s.st_gid) for s in (partial.stat(), earlier))
    if own != theirs:
        try:
            os.chown(partial, *theirs)
        except PermissionError:
            raise PermissionError(
                f"{path} belongs to another user or group, which a new file would not: remove it."
            ) from None
    partial.chmod(stat.S_IMODE(earlier.st_mode))


def _earlier(
    path: Path, status: Callable[[Path], os.stat_result] = os.lstat
) -> os.stat_result | None:
    """Return the status of what is at `path`, which must be fit to be replaced, or nothing."""
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
    """Make the names in `folder` survive a loss of power, where the system can."""
    with contextlib.suppress(PermissionError):  # Windows opens no folder, and some are not readable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
