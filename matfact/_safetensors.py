"""Files in the safetensors format, read and written piece by piece.

The package of that name opens files and refuses the damaged and hostile ones. What is left to do
here is what it does not: NumPy has no bfloat16, so that tensors are read as bytes; and it writes
only what is in memory all at once, where networks need not fit.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open

#: Bytes copied at a time.
_CHUNK = 1 << 22

#: Bytes of an entry, for every dtype that fills whole bytes.
ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
#: Dtypes of 8 bits, by the names that array libraries give them; NumPy has none.
FLOAT8 = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NUMPY = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _NUMPY.items()} | {np.dtype(bool): "BOOL"}


class TensorSpec(NamedTuple):
    """Dtype, by its name in the format, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.itemsize * math.prod(self.shape)


#: A tensor to be written: what it is, and its bytes.
Stored = tuple[TensorSpec, bytes]


class SafetensorsFile:
    """A file in the safetensors format, opened anew for each tensor read.

    Parameters
    ----------
    path : str or Path
        The file. Its header is read and checked against the size of the file.
    pages : ndarray, optional
        What :func:`map_pages` returned for it, if it was called already.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        The tensors by name, in the order of their bytes.
    metadata : dict of str to str
        Whatever else the header holds.

    Raises
    ------
    ValueError
        If the file is truncated or its header is not what the format prescribes.
    """

    def __init__(self, path: str | Path, pages: np.ndarray | None = None) -> None:
        self.path = Path(path)
        if pages is not None:
            self._pages = pages
        try:
            with safe_open(self.path, framework="numpy") as file:
                names = file.offset_keys()
                found = {name: file.get_slice(name) for name in names}
                found = {name: (s.get_dtype(), s.get_shape()) for name, s in found.items()}
                self.metadata: dict[str, str] = file.metadata() or {}
            self.specs = {name: checked_spec(*spec) for name, spec in found.items()}
        except (SafetensorError, ValueError) as error:
            self._refuse(f"is damaged: {error}")
        # Their bytes follow one another, without gaps, up to the end of the file.
        end = self.path.stat().st_size if pages is None else pages.size
        self._begins = {}
        for name in reversed(names):
            end -= self.specs[name].nbytes
            self._begins[name] = end

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(
            f"path must name an intact safetensors file, but {self.path} {reason}."
        ) from None

    def only(self, name: str) -> SafetensorsFile:
        """Return the file with tensor `name` alone, for workers, who need not read its header."""
        file = copy.copy(self)
        file.__dict__.pop("_pages", None)
        file.path, file.metadata = self.path.absolute(), {}
        file.specs = {name: self.specs[name]}
        file._begins = {name: self._begins[name]}
        return file

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of tensor `name` piece by piece."""
        remaining = self.specs[name].nbytes
        with self.path.open("rb") as file:
            file.seek(self._begins[name])
            while remaining:
                chunk = file.read(min(_CHUNK, remaining))
                if not chunk:
                    self._refuse(f"ends within tensor {name!r}")
                remaining -= len(chunk)
                yield chunk

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name`; bfloat16 becomes float32, which holds it exactly.

        Raises
        ------
        ValueError
            If NumPy has no such dtype or the file ends early.
        """
        self._check_dtype(name)
        content = np.empty(self.specs[name].nbytes, dtype=np.uint8)
        with self.path.open("rb") as file:
            file.seek(self._begins[name])
            if file.readinto(content.data) != content.size:
                self._refuse(f"ends within tensor {name!r}")
        return self._as_array(name, content)

    def mapped(self, name: str) -> np.ndarray:
        """Return what :meth:`read` does, in pages that are read when they are first used.

        What is written to the array stays in memory.
        """
        spec = self.specs[name]
        if not spec.nbytes or self._begins[name] % spec.itemsize:
            return self.read(name)
        self._check_dtype(name)
        begin = self._begins[name]
        return self._as_array(name, self._pages[begin : begin + spec.nbytes])

    @functools.cached_property
    def _pages(self) -> np.ndarray:
        return map_pages(self.path)

    def _check_dtype(self, name: str) -> None:
        dtype = self.specs[name].dtype
        if dtype not in ("BOOL", "BF16") and dtype not in _NUMPY:
            raise ValueError(f"{name!r} in {self.path} has dtype {dtype}, unknown to NumPy.")

    def _as_array(self, name: str, content: np.ndarray) -> np.ndarray:
        spec = self.specs[name]
        if spec.dtype == "BF16":
            return from_bfloat16(content.view("<u2")).reshape(spec.shape)
        if spec.dtype == "BOOL":
            return (content != 0).reshape(spec.shape)
        return content.view(_NUMPY[spec.dtype]).reshape(spec.shape)


def map_pages(path: Path) -> np.ndarray:
    """Return all bytes of a file; what is written to them stays in memory."""
    with path.open("rb", buffering=0) as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        except ValueError:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)


def stored(array: np.ndarray, dtype: str | None = None) -> Stored:
    """Return `array` as a tensor to be written, ``dtype="BF16"`` in bfloat16."""
    if dtype == "BF16":
        return TensorSpec("BF16", array.shape), to_bfloat16(array).astype("<u2").tobytes()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if little.dtype not in _NAMES:
        raise ValueError(f"safetensors files cannot hold arrays of dtype {array.dtype}.")
    return TensorSpec(_NAMES[little.dtype], array.shape), little.tobytes()


def in_aligned_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return `specs` with wide entries first, which aligns them all."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].itemsize))


def serialize(
    specs: Mapping[str, TensorSpec], content: Iterable[bytes], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    """Yield the bytes of a file that holds `specs`, whose bytes follow one another in `content`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    yield from content


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Return the bits of `array` rounded to bfloat16, ties to even, as uint16."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # The addition could carry a NaN into infinity; its upper half with the quiet bit is a NaN.
    return np.where(np.isnan(single), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of which `bits` (uint16) are the upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checked_spec(dtype: Any, shape: Any) -> TensorSpec:
    """Return the spec, or raise ``ValueError`` where it is none."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(f"{dtype!r} is not a dtype")
    if not is_sizes(shape) or len(shape) > 32:
        raise ValueError("a shape is not a list of sizes")
    return TensorSpec(dtype, tuple(shape))


def is_sizes(values: Any) -> bool:
    """Whether `values` is a list of whole numbers that are sizes in memory."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
