"""Reading files in the safetensors format.

Nothing is mapped into memory, since truncating a mapped file crashes the process. Bytes read later
are checked against the state of the file when it was opened.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

import numpy as np

from matfact._regular import open_regular
from matfact._safetensors import (
    TensorSpec,
    as_array,
    is_known_to_numpy,
    parse_header,
    read_head,
)

#: Bytes read at a time.
_CHUNK = 1 << 22


class FileState(NamedTuple):
    """State that reveals a changed or replaced file, from any process or machine."""

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileState:
        """Return the state of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_size, status.st_mtime_ns)


class Located(Protocol):
    """A tensor in one or several files, to be read in any process."""

    @property
    def name(self) -> str:
        """The tensor."""

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it is read from."""

    def absolute(self) -> Self:
        """Return it with absolute paths, for other processes."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces."""

    def read(self) -> np.ndarray:
        """Return the tensor; bfloat16 becomes float32, which is exact."""


class TensorLocation(NamedTuple):
    """Location of a tensor's bytes, for readers in any process.

    Attributes
    ----------
    path : Path
        The file.
    name : str
        The tensor.
    spec : TensorSpec
        Its dtype and shape.
    begin : int
        Offset of its first byte.
    state : FileState
        State of the file when its header was read.
    sha256 : bytes, optional
        Checksum of the tensor's bytes, if the file was hashed.
    """

    path: Path
    name: str
    spec: TensorSpec
    begin: int
    state: FileState
    sha256: bytes | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def absolute(self) -> TensorLocation:
        """Return it with an absolute path, for other processes."""
        return self._replace(path=self.path.absolute())

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces; a wrong checksum raises at the end.

        Raises
        ------
        ValueError
            If the file has changed.
        """
        left, digest = self.spec.nbytes, hashlib.sha256()
        with self._opened() as file:
            for chunk in _pieces(file, left):
                left -= len(chunk)
                if self.sha256 is not None:
                    digest.update(chunk)
                yield chunk
        if left or self.sha256 not in (None, digest.digest()):
            raise self._changed()

    def read(self) -> np.ndarray:
        """Return a copy of the tensor; bfloat16 becomes float32, which is exact.

        Raises
        ------
        ValueError
            If NumPy lacks the dtype, or the file has changed.
        """
        self.check_dtype()
        content = np.empty(self.spec.nbytes, dtype=np.uint8)
        with self._opened() as file:
            is_whole = _filled(file, content) == content.size
        if not is_whole or self._differs(content):
            raise self._changed()
        return as_array(self.spec, content)

    def check_dtype(self) -> None:
        """Raise ``ValueError`` if NumPy lacks the dtype."""
        if not is_known_to_numpy(self.spec.dtype):
            raise ValueError(
                f"{self.name!r} in {self.path} has dtype {self.spec.dtype}, unknown to NumPy."
            )

    def _differs(self, content: np.ndarray) -> bool:
        return self.sha256 is not None and hashlib.sha256(content.data).digest() != self.sha256

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with open_regular(self.path) as file:
            if self.sha256 is None and FileState.of(file) != self.state:
                raise self._changed()
            file.seek(self.begin)
            yield file

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.path} must stay as it is while it is read, but tensor {self.name!r} has "
            "changed since the file was opened."
        )


class SafetensorsFile:
    """File in the safetensors format, read one tensor at a time.

    The file is reopened for each tensor. What is read is checked against checksums once
    `sha256` has been computed, and against the file's size and time before.

    Parameters
    ----------
    path : str or Path
        The file. Its header is read and checked against the size of the file.
    in_memory : bool, default=False
        Whether to read the whole file at once. Tensors are then views of its bytes.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        The tensors by name, in the order of their bytes.
    metadata : dict of str to str
        Other entries of the header.

    Raises
    ------
    ValueError
        If the file is truncated or its header is invalid.
    """

    def __init__(self, path: str | Path, *, in_memory: bool = False) -> None:
        self.path = Path(path)
        self._content: np.ndarray | None = None
        self._digests: dict[str, bytes] = {}
        try:
            with open_regular(self.path) as file:
                self._state = FileState.of(file)
                head = read_head(file.read, self._state.nbytes)
                self._start, self._head = len(head), hashlib.sha256(head).digest()
                text = str(memoryview(head)[8:], "utf-8")
                if not in_memory:
                    del head  # it may take 100 MB
                self.specs, self.metadata = parse_header(text, self._state.nbytes - self._start)
                if in_memory:
                    self._content = self._rest(file, head)
        except ValueError as error:
            raise ValueError(
                f"path must name an intact safetensors file, but {self.path} is damaged: {error}"
            ) from None

    @classmethod
    def of_bytes(cls, content: np.ndarray, name: str) -> SafetensorsFile:
        """Open the bytes of a file that lies in memory, called `name` in errors.

        Raises
        ------
        ValueError
            If they are no intact file.
        """
        file = cls.__new__(cls)
        file.path, file._content, file._digests = Path(name), content, {}
        file._state = FileState(content.size, 0)
        left = content.data

        def read(n: int) -> bytes:
            nonlocal left
            piece, left = bytes(left[:n]), left[n:]
            return piece

        try:
            head = read_head(read, content.size)
            file._start, file._head = len(head), hashlib.sha256(head).digest()
            file.specs, file.metadata = parse_header(str(head[8:], "utf-8"), len(left))
        except ValueError as error:
            raise ValueError(f"{name} must hold a safetensors file: {error}.") from None
        return file

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._state.nbytes

    def _rest(self, file: BinaryIO, head: bytes) -> np.ndarray:
        """Return the bytes of the whole file; `head` was already read."""
        content = np.empty(self._state.nbytes, dtype=np.uint8)
        content[: self._start] = np.frombuffer(head, np.uint8)
        if _filled(file, content[self._start :]) < content.size - self._start:
            raise ValueError("it was truncated while it was read")
        return content

    def location(self, name: str) -> TensorLocation:
        """Return the location of tensor `name`."""
        begin = self._begins[name]
        spec, digest = self.specs[name], self._digests.get(name)
        return TensorLocation(self.path, name, spec, begin, self._state, digest)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of tensor `name` in pieces."""
        if self._content is None:
            yield from self.location(name).chunks()
        else:
            yield self._bytes(name).tobytes()

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`; bfloat16 becomes float32, which is exact.

        Raises
        ------
        ValueError
            If NumPy lacks the dtype, or the file has changed.
        """
        if self._content is None:
            return self.location(name).read()
        location = self.location(name)
        location.check_dtype()
        return as_array(location.spec, self._bytes(name))

    def _bytes(self, name: str) -> np.ndarray:
        assert self._content is not None
        begin = self._begins[name]
        return self._content[begin : begin + self.specs[name].nbytes]

    @functools.cached_property
    def _begins(self) -> dict[str, int]:
        """Offset of the first byte of each tensor."""
        ends = itertools.accumulate((s.nbytes for s in self.specs.values()), initial=self._start)
        return dict(zip(self.specs, ends, strict=False))

    @functools.cached_property
    def sha256(self) -> str:
        """Checksum of the file. Everything read afterwards is checked against it."""
        if self._content is not None:
            return hashlib.sha256(self._content.data).hexdigest()
        with open_regular(self.path) as file:
            whole = hashlib.sha256(file.read(self._start))
            if whole.digest() != self._head:
                raise self._changed()
            for name, spec in self.specs.items():
                self._digests[name] = hash_bytes(file, spec.nbytes, whole)
            if file.tell() != self._state.nbytes or file.read(1):
                raise self._changed()
        return whole.hexdigest()

    def digest(self, name: str) -> bytes:
        """Return the checksum of the bytes of tensor `name`."""
        assert self.sha256
        return self._digests[name]

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} must stay as it is while it is read, but was changed.")


def hash_bytes(file: BinaryIO, nbytes: int, whole: hashlib._Hash) -> bytes:
    """Return the checksum of the next `nbytes` bytes, and add them to `whole`."""
    own = hashlib.sha256()
    for chunk in _pieces(file, nbytes):
        whole.update(chunk)
        own.update(chunk)
    return own.digest()


def _filled(file: BinaryIO, content: np.ndarray) -> int:
    """Read into an array and return the number of bytes read."""
    return file.readinto(content.data) if content.size else 0  # type: ignore[attr-defined]


def _pieces(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    """Yield up to `nbytes` bytes in pieces."""
    while nbytes and (chunk := file.read(min(_CHUNK, nbytes))):
        nbytes -= len(chunk)
        yield chunk
