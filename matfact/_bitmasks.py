"""Weights of compressed-tensors in its formats ``sparse-bitmask`` and ``sparse-24-bitmask``.

A weight is stored as several tensors: ``compressed`` (the values kept, in order), ``bitmask`` (one
bit per entry, rows padded to whole bytes, lowest bit first), ``shape``, and in ``sparse-bitmask``
``row_offsets``. Releases 0.3 to 0.8 add these names to that of the weight (``fc.weight.bitmask``),
releases 0.9 to 0.14 to that of the layer (``fc.bitmask``); later ones have no sparse formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matfact._safetensors import TensorSpec, as_array, checked_spec, is_known_to_numpy
from matfact._safetensors_file import Located, TensorLocation

_NEEDED = ("compressed", "bitmask", "shape")
_PARTS = (*_NEEDED, "row_offsets")
#: Bytes of the dense tensor yielded at a time.
_CHUNK = 1 << 22


class BitmaskLocation(NamedTuple):
    """Weight stored as its values and a mask.

    Attributes
    ----------
    name : str
        Name of the dense weight.
    spec : TensorSpec
        Its dtype and shape.
    values, mask : TensorLocation
        The values kept and the mask.
    offsets : TensorLocation or None
        Number of the first value of each row, in ``sparse-bitmask``.
    """

    name: str
    spec: TensorSpec
    values: TensorLocation
    mask: TensorLocation
    offsets: TensorLocation | None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the parts, each once."""
        return tuple(dict.fromkeys(part.path for part in self._parts))

    @property
    def _parts(self) -> list[TensorLocation]:
        return [part for part in (self.values, self.mask, self.offsets) if part is not None]

    def absolute(self) -> BitmaskLocation:
        """Return it with absolute paths, for other processes."""
        offsets = None if self.offsets is None else self.offsets.absolute()
        return self._replace(
            values=self.values.absolute(), mask=self.mask.absolute(), offsets=offsets
        )

    def read(self) -> np.ndarray:
        """Return the dense weight; bfloat16 becomes float32, which is exact."""
        return as_array(self.spec, self._bits().view(np.uint8).reshape(-1))

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the dense weight in pieces."""
        bits = self._bits()
        step = _CHUNK // self.spec.itemsize
        for start in range(0, bits.size, step):
            yield bits[start : start + step].tobytes()

    def _bits(self) -> np.ndarray:
        """Return the dense entries as unsigned integers, whose bits are those of the values."""
        mask = self._mask()
        values = np.frombuffer(b"".join(self.values.chunks()), f"<u{self.spec.itemsize}")
        if np.count_nonzero(mask) != values.size:
            raise _invalid(self.mask, f"has {np.count_nonzero(mask)} bits for {values.size} values")
        bits = np.zeros(mask.size, values.dtype)
        bits[mask.reshape(-1)] = values
        return bits

    def _mask(self) -> np.ndarray:
        packed, columns = self.mask.read(), self.spec.shape[-1]
        mask = np.unpackbits(packed, axis=-1, bitorder="little").view(np.bool_)
        if mask[..., columns:].any():
            raise _invalid(self.mask, "has bits beyond the last column")
        mask = mask[..., :columns]
        if self.offsets is not None:
            counts = np.atleast_1d(mask.sum(axis=-1))
            begins = np.cumsum(counts, axis=0) - counts
            if not np.array_equal(self.offsets.read().reshape(counts.shape), begins):
                raise _invalid(self.offsets, "contradicts the bitmask")
        return mask


def dense_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the weights stored with masks, each with the names of its parts.

    Raises
    ------
    ValueError
        If a part is missing, or a weight is stored twice.
    """
    held = set(names)
    ends = {end: f".{end}" for end in _NEEDED[:2]}
    layers = sorted({n.removesuffix(end) for end in ends.values() for n in held if n.endswith(end)})
    found = {}
    for layer in layers:
        parts = {part: f"{layer}.{part}" for part in _PARTS if f"{layer}.{part}" in held}
        if len(parts) > 1:  # else it only has such a name
            found[layer] = parts
    # Releases up to 0.8 add the parts to the names of all tensors, so some end in "weight".
    is_full = any(layer.rpartition(".")[2] == "weight" for layer in found)
    weights = {layer if is_full else f"{layer}.weight": parts for layer, parts in found.items()}
    for name, parts in weights.items():
        if missing := [part for part in _NEEDED if part not in parts]:
            raise ValueError(f"{name!r} is stored with a bitmask, but lacks {', '.join(missing)}.")
        if name in held:
            raise ValueError(f"{name!r} must be stored once, but is dense and has a bitmask.")
    return weights


def locate_all(
    names: Collection[str], location: Callable[[str], TensorLocation]
) -> dict[str, Located]:
    """Return the locations of all tensors of a file, those stored with masks as dense ones."""
    masked = dense_names(names)
    parts = {part for held in masked.values() for part in held.values()}
    plain: dict[str, Located] = {name: location(name) for name in names if name not in parts}
    return plain | {name: locate(name, held, location) for name, held in masked.items()}


def locate(
    name: str, parts: Mapping[str, str], location: Callable[[str], TensorLocation]
) -> BitmaskLocation:
    """Return the location of a weight after checking the sizes of its parts.

    Parameters
    ----------
    name : str
        The weight.
    parts : mapping of str to str
        Names of its parts, from `dense_names`.
    location : callable
        Returns the location of a stored tensor.

    Raises
    ------
    ValueError
        If the parts contradict each other, or values are 8-bit floats.
    """
    values, mask, shape_of = (location(parts[part]) for part in _NEEDED)
    offsets = location(parts["row_offsets"]) if "row_offsets" in parts else None
    if not is_known_to_numpy(values.spec.dtype):
        raise _invalid(values, f"has dtype {values.spec.dtype}: quantized values are not read")
    shape = _shape(shape_of)
    spec = checked_spec(values.spec.dtype, list(shape))
    row = TensorSpec("U8", (*shape[:-1], -(-shape[-1] // 8)))
    if mask.spec != row:
        raise _invalid(mask, f"must be U8 of shape {row.shape}, got {mask.spec}")
    count = math.prod(values.spec.shape)
    if offsets is None and 2 * count != math.prod(shape):
        raise _invalid(values, f"must hold half of the entries of shape {shape}, got {count}")
    if offsets is not None and offsets.spec != TensorSpec("I64", shape[:-1]):
        raise _invalid(offsets, f"must be I64 of shape {shape[:-1]}, got {offsets.spec}")
    return BitmaskLocation(name, spec, values, mask, offsets)


def _shape(location: TensorLocation) -> tuple[int, ...]:
    """Return the dense shape that a small tensor holds."""
    dtype, sides = location.spec
    if dtype != "I64" or len(sides) not in (1, 2) or sides[1:] not in ((), (1,)) or sides[0] > 8:
        raise _invalid(location, f"must hold up to 8 sizes as I64, got {location.spec}")
    shape = tuple(location.read().reshape(-1).tolist())
    if not shape or min(shape) < 0:
        raise _invalid(location, f"must hold the sizes of a tensor, got {shape}")
    return shape


def _invalid(location: TensorLocation, problem: str) -> ValueError:
    return ValueError(f"{location.name!r} in {location.path} {problem}.")
