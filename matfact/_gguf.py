"""Reading of GGUF files; quantized tensors become float32 through the package gguf.

Its reader maps the file into memory, so truncating the file would crash the process, and follows
lengths in the file without limits. Only its types and its dequantization are used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from matfact._regular import open_regular
from matfact._safetensors import ITEMSIZES, TensorSpec
from matfact._safetensors_file import FileState, TensorLocation, hash_bytes
from matfact._text import extra

SUFFIX = ".gguf"
#: Maximum size of a header, in bytes.
_LONGEST_HEADER = 100_000_000
_VERSIONS = (2, 3)
#: Struct codes of the scalar types of metadata, by number.
_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Maximum nesting of arrays.
_DEEPEST = 4
_MOST_AXES = 8
#: Bytes of codes converted at a time.
_CODES = 1 << 18


class QuantizedLocation(NamedTuple):
    """Quantized tensor in a GGUF file, read as float32.

    Attributes
    ----------
    name : str
        The tensor.
    spec : TensorSpec
        Shape, and the dtype it is converted to.
    codes : TensorLocation
        Its bytes.
    kind : int
        Number of its type in GGUF.
    """

    name: str
    spec: TensorSpec
    codes: TensorLocation
    kind: int

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return self.codes.files

    def absolute(self) -> QuantizedLocation:
        """Return it with an absolute path, for other processes."""
        return self._replace(codes=self.codes.absolute())

    def read(self) -> np.ndarray:
        """Return the tensor."""
        values, end = np.empty(self.spec.nbytes // 4, np.float32), 0
        for part in self._parts():
            values[end : end + part.size] = part
            end += part.size
        return values.reshape(self.spec.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the tensor in pieces."""
        for part in self._parts():
            yield part.astype("<f4", copy=False).tobytes()

    def _parts(self) -> Iterator[np.ndarray]:
        """Yield the values, a few blocks at a time."""
        gguf = _package(self.codes.path)
        kind = gguf.GGMLQuantizationType(self.kind)
        block = gguf.GGML_QUANT_SIZES[kind][1]
        step, left = _CODES // block * block, b""
        for chunk in self.codes.chunks():
            left += chunk
            for start in range(0, len(left) - step + 1, step):
                yield _dequantized(gguf, left[start : start + step], kind)
            left = left[len(left) // step * step :]
        if left:
            yield _dequantized(gguf, left, kind)


class GgufFile:
    """File in the GGUF format, version 2 or 3, read one tensor at a time.

    Parameters
    ----------
    path : str or Path
        The file. Its header is read and checked against the size of the file.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        The tensors by name, in the order of their bytes, with the fastest axis last. Quantized ones
        are converted to float32.
    metadata : dict of str to str
        Empty.

    Raises
    ------
    ImportError
        If the package gguf is not installed.
    ValueError
        If the file is damaged, big-endian, a part of several, or of an unknown type.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._digests: dict[str, bytes] = {}
        gguf = _package(self.path)
        try:
            with open_regular(self.path) as file:
                self._state = FileState.of(file)
                fields, entries, self._start = _header(_Head(file, self._state.nbytes))
                file.seek(0)
                self._head = hashlib.sha256(file.read(self._start)).digest()
            if fields.get("split.count", 1) not in (0, 1):
                raise ValueError("it is a part of several: merge them with llama-gguf-split")
            places = sorted(
                (_placed(gguf, entry, self._start) for entry in entries), key=lambda p: p.begin
            )
            _check_places(places, self._state.nbytes)
        except ValueError as error:
            raise ValueError(
                f"path must name an intact GGUF file, but {self.path} is not: {error}."
            ) from None
        self._places = {place.name: place for place in places}
        self.specs = {place.name: place.spec for place in places}

    def location(self, name: str) -> TensorLocation | QuantizedLocation:
        """Return the location of tensor `name`."""
        place = self._places[name]
        known = (self._state, self._digests.get(name))
        if place.kind is None:
            return TensorLocation(self.path, name, place.spec, place.begin, *known)
        codes = TensorSpec("U8", (place.nbytes,))
        held = TensorLocation(self.path, name, codes, place.begin, *known)
        return QuantizedLocation(name, place.spec, held, place.kind)

    @functools.cached_property
    def sha256(self) -> str:
        """Checksum of the file. Everything read afterwards is checked against it."""
        with open_regular(self.path) as file:
            whole = hashlib.sha256(file.read(self._start))
            if whole.digest() != self._head:
                raise self._changed()
            for name, place in self._places.items():
                hash_bytes(file, place.begin - file.tell(), whole)
                self._digests[name] = hash_bytes(file, place.nbytes, whole)
            hash_bytes(file, self._state.nbytes - file.tell(), whole)
            if file.tell() != self._state.nbytes or file.read(1):
                raise self._changed()
        return whole.hexdigest()

    def digest(self, name: str) -> bytes:
        """Return the checksum of the stored bytes of tensor `name`."""
        assert self.sha256
        return self._digests[name]

    def _changed(self) -> ValueError:
        return ValueError(f"{self.path} must stay as it is while it is read, but was changed.")


class _Place(NamedTuple):
    """A tensor and its bytes; `kind` is None unless it is quantized."""

    name: str
    spec: TensorSpec
    begin: int
    nbytes: int
    kind: int | None


class _Entry(NamedTuple):
    """A tensor as listed in the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Head:
    """Header of a file, read from the beginning, within limits."""

    def __init__(self, file: BinaryIO, nbytes: int) -> None:
        self._file, self._limit = file, min(nbytes, _LONGEST_HEADER)
        self.left = self._limit

    @property
    def end(self) -> int:
        """Bytes read so far."""
        return self._limit - self.left

    def bytes(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self._take(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        self._take(count)
        self._file.seek(count, 1)

    def number(self, code: str) -> Any:
        """Return the next number, of a type of `struct`."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.bytes(size).ljust(size, b"\0"))[0]

    def text(self) -> str:
        """Return the next string."""
        return self.bytes(self.number("Q")).decode()

    def _take(self, count: int) -> None:
        if count > self.left:
            raise ValueError("its header is cut or too long")
        self.left -= count


def _header(head: _Head) -> tuple[dict[str, Any], list[_Entry], int]:
    """Return the numbers in the metadata, the tensors, and where their bytes begin."""
    if head.bytes(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = head.number("I")
    if version not in _VERSIONS:
        order = ", in the order of big-endian machines" if version & 0xFFFF == 0 else ""
        raise ValueError(f"it is of version {version}{order}; allowed are 2 and 3")
    n_tensors, n_fields = head.number("Q"), head.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):  # ends where the header does
        name, kind = head.text(), head.number("I")
        if name in fields:
            raise ValueError(f"{name!r} comes twice")
        fields[name] = _value(head, kind)
    entries = [_entry(head) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment < 1 << 32 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
    return fields, entries, -(-head.end // alignment) * alignment


def _value(head: _Head, kind: int, depth: int = 0) -> Any:
    """Return a number of the metadata, and None for anything else, which is passed over."""
    if kind in _SCALARS:
        return head.number(_SCALARS[kind])
    if kind == _STRING:
        return head.skip(head.number("Q"))
    if kind != _ARRAY or depth > _DEEPEST:
        raise ValueError(f"it has a value of unknown type {kind}")
    inner, count = head.number("I"), head.number("Q")
    if inner in _SCALARS:
        return head.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
    if count > head.left // 8:  # a string or an array takes eight bytes or more
        raise ValueError("its header is cut or too long")
    for _ in range(count):
        _value(head, inner, depth + 1)
    return None


def _entry(head: _Head) -> _Entry:
    name, n_axes = head.text(), head.number("I")
    if n_axes > _MOST_AXES:
        raise ValueError(f"tensor {name!r} has {n_axes} axes; at most {_MOST_AXES} are allowed")
    shape = tuple(head.number("Q") for _ in range(n_axes))
    return _Entry(name, shape[::-1], head.number("I"), head.number("Q"))


def _placed(gguf: ModuleType, entry: _Entry, start: int) -> _Place:
    """Return where a tensor is, after checking its type."""
    name, shape = entry.name, entry.shape
    if any(side >= 1 << 62 for side in shape):
        raise ValueError(f"tensor {name!r} has the shape {shape}")
    kind = _kind(gguf, entry)
    if kind.name in ITEMSIZES:
        spec = TensorSpec(kind.name, shape)
        return _Place(name, spec, start + entry.offset, spec.nbytes, None)
    n_values, block = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % n_values:
        raise ValueError(f"tensor {name!r} has the shape {shape}, but {kind.name} takes rows of "
                         f"whole blocks of {n_values}")  # fmt: skip
    spec = TensorSpec("F32", shape)
    nbytes = spec.nbytes // (4 * n_values) * block
    return _Place(name, spec, start + entry.offset, nbytes, entry.kind)


def _kind(gguf: ModuleType, entry: _Entry) -> Any:
    """Return the type of a tensor, one that can be converted."""
    try:
        kind = gguf.GGMLQuantizationType(entry.kind)
        if kind.name not in ITEMSIZES:
            _dequantized(gguf, bytes(gguf.GGML_QUANT_SIZES[kind][1]), kind)
        return kind
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(
            f"tensor {entry.name!r} is of type {entry.kind}, which gguf {_version(gguf)} "
            "cannot convert"
        ) from None


def _version(gguf: ModuleType) -> str:
    from importlib.metadata import version

    return version(gguf.__name__)


def _check_places(places: list[_Place], nbytes: int) -> None:
    """Raise ``ValueError`` unless tensors are in the file, apart, and of different names."""
    for place in places:
        if place.begin + place.nbytes > nbytes:
            raise ValueError(f"tensor {place.name!r} ends beyond the file")
    for one, other in itertools.pairwise(places):
        if one.begin + one.nbytes > other.begin:
            raise ValueError(f"tensors {one.name!r} and {other.name!r} overlap")
    if len({place.name for place in places}) < len(places):
        raise ValueError("two tensors have the same name")


def _dequantized(gguf: ModuleType, codes: bytes, kind: Any) -> np.ndarray:
    """Return the values of whole blocks."""
    with np.errstate(all="ignore"):  # scales may be anything
        values: np.ndarray = gguf.dequantize(np.frombuffer(codes, np.uint8), kind)
    return values


def _package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"Reading {path} needs {extra('gguf')}.") from error
    module: ModuleType = gguf
    return module
