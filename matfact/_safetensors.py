"""The safetensors format: headers and bytes of tensors.

The safetensors package maps files into memory, so truncating a file crashes its readers, and it
can only write tensors that are all in memory. Tensors are bytes here since NumPy lacks bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from matfact._json import parse_json

#: The file of weights in a folder of Hugging Face.
SINGLE_FILE = "model.safetensors"
#: Maximum size of a header in the format, in bytes.
_LONGEST_HEADER = 100_000_000

#: Bytes per entry, for every dtype of whole bytes.
ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
#: 8-bit floating dtypes, by their names in array libraries; NumPy has none.
FLOAT8 = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_NUMPY = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _NUMPY.items()} | {np.dtype(bool): "BOOL"}
_OF_ARRAYS = {name: dtype.name for dtype, name in _NAMES.items()} | {
    name: dtype for dtype, name in FLOAT8.items()
} | {"BF16": "bfloat16"}  # fmt: skip
_ENTRY = frozenset({"dtype", "shape", "data_offsets"})


class TensorSpec(NamedTuple):
    """Dtype (its name in the format) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return ITEMSIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.itemsize * math.prod(self.shape)


def array_dtype(dtype: str) -> str:
    """Return the name of a safetensors dtype in array libraries."""
    return _OF_ARRAYS.get(dtype, dtype)


#: A tensor to write: its spec and its bytes.
Stored = tuple[TensorSpec, bytes]


class Header(NamedTuple):
    """Header of a file.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        The tensors by name, in the order of their bytes, which are contiguous.
    metadata : dict of str to str
        Other entries of the header.
    """

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]


def read_head(read: Callable[[int], bytes], nbytes: int) -> bytes:
    """Return the header of a file of `nbytes` bytes, including its eight-byte length."""
    first = read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(nbytes - 8, _LONGEST_HEADER):
        raise ValueError("its header is cut or too long")
    return first + read(length)


def parse_header(text: str, nbytes: int) -> Header:
    """Parse a header followed by `nbytes` bytes, or raise ``ValueError``."""
    known: dict[str, TensorSpec] = {}  # millions of tensors may share a few specs

    def convert(fields: dict[str, Any]) -> Any:
        """Return offsets and spec of an entry."""
        if not (fields.keys() >= _ENTRY and isinstance(fields["shape"], list)):
            return fields
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        kind = f"{dtype!r}{shape}"
        spec = known.get(kind) or known.setdefault(kind, checked_spec(dtype, shape))
        if not is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
            raise ValueError(f"offsets {offsets!r:.80} do not fit a tensor of {spec.nbytes} bytes")
        return offsets[0], spec

    fields = parse_json(text, convert)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not strings")
    if not all(isinstance(entry, tuple) for entry in fields.values()):
        raise ValueError("an entry is not dtype, shape and offsets")
    specs, end = {}, 0
    # Empty tensors come before the tensor with the same offset.
    for name in sorted(fields, key=lambda n: 2 * fields[n][0] + (fields[n][1].nbytes > 0)):
        begin, specs[name] = fields.pop(name)
        if begin != end:
            raise ValueError(f"tensor {name!r} does not begin where the one before ends")
        end += specs[name].nbytes
    if end != nbytes:
        raise ValueError(f"its tensors take {end} bytes, but there are {nbytes}")
    return Header(specs, metadata)


def is_known_to_numpy(dtype: str) -> bool:
    """Whether NumPy arrays can hold a dtype; bfloat16 becomes float32."""
    return dtype in ("BOOL", "BF16") or dtype in _NUMPY


def as_array(spec: TensorSpec, content: np.ndarray) -> np.ndarray:
    """Return bytes as an array, without a copy if NumPy has the dtype and they are aligned.

    Kernels for aligned values, which give the same sums in any process, need this.
    """
    if spec.dtype == "BF16":
        return from_bfloat16(content.view("<u2")).reshape(spec.shape)
    if spec.dtype == "BOOL":
        return (content != 0).reshape(spec.shape)
    array = content.view(_NUMPY[spec.dtype]).reshape(spec.shape)
    return np.require(array, requirements="A")


def stored(array: np.ndarray, dtype: str | None = None) -> Stored:
    """Return `array` as a tensor to write, in bfloat16 with ``dtype="BF16"``."""
    if dtype == "BF16":
        return TensorSpec("BF16", array.shape), to_bfloat16(array).astype("<u2").tobytes()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if little.dtype not in _NAMES:
        raise ValueError(f"safetensors files cannot hold arrays of dtype {array.dtype}.")
    return TensorSpec(_NAMES[little.dtype], array.shape), little.tobytes()


def in_aligned_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return `specs` with wide entries first, so that all are aligned."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].itemsize))


def serialize(
    specs: Mapping[str, TensorSpec], content: Iterable[bytes], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    """Yield the bytes of a file with the tensors `specs`; `content` yields their bytes in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # align tensors
    yield len(text).to_bytes(8, "little") + text
    yield from content


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Return the bits of `array` rounded to bfloat16, ties to even, as uint16."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(array, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # The addition could turn a NaN into infinity; a NaN's upper half with the quiet bit stays NaN.
    return np.where(np.isnan(single), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 numbers with upper halves `bits` (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checked_spec(dtype: Any, shape: Any) -> TensorSpec:
    """Return a validated spec, or raise ``ValueError``."""
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(f"{dtype!r} is not a dtype")
    if not is_sizes(shape) or len(shape) > 32:
        raise ValueError("a shape is not a list of sizes")
    return TensorSpec(dtype, tuple(shape))


def is_sizes(values: Any) -> bool:
    """Whether `values` is a list of integers that are valid sizes."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
