"""Encoding of factors as named tensors: values in their dtype, positions in few bytes.

``docs/checkpoint-format.md`` describes the format for other readers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from matfact import backend
from matfact._safetensors import FLOAT8, Stored, TensorSpec, is_sizes, stored
from matfact.backend import Array
from matfact.operators._block import BlockSparseFactor
from matfact.operators._coding import expanded, gaps, huffman, need, places
from matfact.operators._csr import SparseFactor
from matfact.operators._dense import DenseFactor
from matfact.operators._factor import Factor, dtype_nbytes
from matfact.operators._kronecker import KroneckerSparseFactor
from matfact.operators._levels import decode_levels, decode_scales, encode_levels
from matfact.operators._quantized import QuantizedFactor
from matfact.operators._selection import SelectionFactor
from matfact.operators._sign import SignFactor

#: Maximum rows or columns of a stored factor, so that a file cannot claim a huge side.
LARGEST_SIDE = 1 << 24
#: Share of entries below which the gaps between them are stored in place of a mask.
THIN = 0.1
Tensors = dict[str, np.ndarray]


def encode(
    factors: Sequence[Factor], dtype: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, Stored]]:
    """Return a description of each factor, and the tensors of all factors.

    Parameters
    ----------
    factors : sequence of Factor
        The factors, of any array library.
    dtype : str, optional
        ``"BF16"`` rounds real values to bfloat16. By default dtypes are kept.
    """
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Stored] = {}
    for i, factor in enumerate(factors):
        kind, arrays = _positions(factor)
        is_complex = _is_complex(factor.values)
        entry = {"kind": kind, "shape": list(factor.shape), "complex": is_complex}
        if isinstance(factor, QuantizedFactor):
            entry["quantized"], codes = encode_levels(factor, dtype or stored_dtype(factor))
            arrays |= codes
        else:
            real = None if is_complex else dtype
            tensors[f"{i}.values"] = _stored_values(factor.values, real)
        entries.append(entry)
        tensors |= {f"{i}.{name}": stored(array) for name, array in arrays.items()}
    return entries, tensors


def stored_nbytes(factor: Factor, itemsize: int | None = None) -> int:
    """Return the bytes of the tensors that hold a factor, floating-point values in `itemsize`."""
    arrays = _positions(factor)[1]
    if isinstance(factor, QuantizedFactor):
        arrays |= encode_levels(factor, stored_dtype(factor))[1]
        return sum(array.nbytes for array in arrays.values())
    own = math.prod(factor.values.shape) * (itemsize or dtype_nbytes(factor.dtype))
    return own + sum(array.nbytes for array in arrays.values())


def stored_dtype(factor: Factor) -> str:
    """Return the dtype of the values, by its name in files."""
    carrier = factor.scales if isinstance(factor, QuantizedFactor) else factor.values
    return stored_array(carrier[:0])[0].dtype


def decode(entries: Sequence[dict[str, Any]], tensors: Tensors) -> list[Factor]:
    """Return the factors described by `entries`, with NumPy values.

    Raises
    ------
    ValueError
        If a tensor is missing, left over, or contradicts a description.
    """
    factors: list[Factor] = []
    by_factor: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        number, _, own = name.partition(".")
        by_factor.setdefault(number, {})[own] = tensor
    for i, entry in enumerate(entries):
        try:
            factors.append(_decode_one(entry, by_factor.pop(str(i), {})))
        except KeyError as error:
            raise ValueError(f"factor {i} lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"factor {i} is inconsistent: {error}") from None
    need(not by_factor, "tensors belong to no factor")
    return factors


def _decode_one(entry: dict[str, Any], tensors: Tensors) -> Factor:
    shape, decoder = entry["shape"], _DECODERS.get(entry["kind"])
    need(decoder is not None, f"unknown storage {entry['kind']!r}")
    need(is_sizes(shape) and len(shape) == 2, "its shape is not two sizes")
    need(max(shape) <= LARGEST_SIDE, f"no side may exceed {LARGEST_SIDE}, got shape {shape}")
    need(isinstance(entry["complex"], bool), "complex is not true or false")
    quantized, scales = entry.get("quantized"), np.zeros(0)
    if quantized is None:
        values = _decode_values(tensors.pop("values"), entry["complex"])
    else:
        need(entry["kind"] in _PATTERNS, f"a storage {entry['kind']!r} holds no quantized values")
        need(not entry["complex"], "complex values cannot be quantized")
        values, scales = decode_levels(quantized, tensors), tensors.pop("scales")
    assert decoder is not None
    factor = decoder((shape[0], shape[1]), values, tensors)
    need(not tensors, f"{', '.join(tensors)} mean nothing to it")
    need(factor.shape == tuple(shape), f"values of shape {values.shape} do not give {shape}")
    return factor if quantized is None else decode_scales(quantized, factor, scales)


def _decode_values(values: np.ndarray, is_complex: bool) -> np.ndarray:
    if is_complex:
        need(values.ndim > 0 and values.shape[-1] == 2, "complex values are not pairs")
        real = np.ascontiguousarray(values, np.result_type(values, np.float32))
        values = real.view(np.result_type(real, np.complex64))[..., 0]  # signs of zeros stay
    need(values.dtype.kind in "fc", f"values of dtype {values.dtype}")
    return values


def _is_complex(values: Array) -> bool:
    return bool(backend.namespace(values).isdtype(values.dtype, "complex floating"))


def _stored_values(values: Array, dtype: str | None) -> Stored:
    """Return the values to write; complex ones as pairs of reals along a new last axis."""
    if not _is_complex(values):
        return stored_array(values, dtype)
    array = backend.to_numpy(values)
    return stored(np.stack([array.real, array.imag], axis=-1))


def stored_array(array: Array, dtype: str | None = None) -> Stored:
    """Return an array to write bit by bit, rounded to bfloat16 with ``dtype="BF16"``."""
    name = str(array.dtype).rpartition(".")[2]
    if name in FLOAT8:
        bits = backend.to_numpy(array.view(backend.namespace(array).uint8))
        return TensorSpec(FLOAT8[name], bits.shape), bits.tobytes()
    host = backend.to_numpy(array)
    if name == "float16":  # read as float32, like bfloat16
        host = host.astype(np.float16)
    return stored(host, "BF16" if name == "bfloat16" else dtype)


def _narrowed(positions: np.ndarray) -> np.ndarray:
    """Return integers in the smallest of 2, 4 and 8 bytes."""
    low, high = (int(positions.min()), int(positions.max())) if positions.size else (0, 0)
    for dtype in (np.uint16, np.uint32, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return positions.astype(dtype)
    return positions.astype(np.int64)


def _positions(factor: Factor) -> tuple[str, Tensors]:
    """Return the name of the storage and the arrays, besides the values, that it consists of."""
    if isinstance(factor, QuantizedFactor):
        if (stored_as := _positions(factor.pattern))[0] not in _PATTERNS:
            raise TypeError(f"quantized values in {factor.pattern!r} cannot be stored.")
        return stored_as
    if isinstance(factor, SparseFactor):
        return _sparse_positions(factor)
    if isinstance(factor, BlockSparseFactor):
        return factor.kind, {"blocks": _narrowed(factor.blocks)}
    if isinstance(factor, SelectionFactor):
        return factor.kind, {"index": _narrowed(factor.index)}
    if isinstance(factor, SignFactor):
        return factor.kind, {"signs": factor.bits}
    if factor.kind not in _DECODERS:
        raise TypeError(f"factors of {type(factor).__name__} cannot be stored.")
    return factor.kind, {}


def _sparse_positions(factor: SparseFactor) -> tuple[str, Tensors]:
    """Return the smallest of column indices, one bit an entry, and Huffman codes."""
    rows, columns = factor.shape
    csr = {"indptr": _narrowed(factor.indptr), "indices": _narrowed(factor.indices)}
    if not factor.is_ordered:  # which the others cannot tell, nor two values in one place
        return factor.kind, csr
    smallest = sum(array.nbytes for array in csr.values())
    mask_nbytes = (rows * columns + 7) // 8
    # Few entries are told in fewer bits by the gaps between them; masks are read faster.
    is_thin = factor.nnz < THIN * rows * columns
    coded = huffman(gaps(factor.locations) if is_thin else factor.bits)
    if coded.size < min(smallest, mask_nbytes) and rows <= 8 * coded.size:
        return "gaps" if is_thin else "bitmask", {"coded": coded}
    return (factor.kind, csr) if smallest < mask_nbytes else ("bitmask", {"mask": factor.bits})


def _decode_dense(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    need(values.ndim == 2, "dense values are not a matrix")
    return DenseFactor(values)


def _decode_kronecker(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    need(values.ndim == 4, "values are not 4-D")
    return KroneckerSparseFactor(values)


def _decode_bitmask(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    need(values.ndim == 1, "values are not a vector")
    cells, coded = shape[0] * shape[1], tensors.pop("coded", None)
    if coded is not None:
        _check_rows(shape, coded)
        packed = expanded(coded, (cells + 7) // 8)
    else:
        packed = tensors.pop("mask")
    _check_bits(packed, cells)
    return SparseFactor.from_bits(values, packed, shape)


def _decode_gaps(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    need(values.ndim == 1, "values are not a vector")
    coded = tensors.pop("coded")
    _check_rows(shape, coded)
    steps = expanded(coded, values.size + shape[0] * shape[1] // 255)
    return SparseFactor(values, *places(steps, values.size, shape), shape[1])


def _check_rows(shape: tuple[int, int], coded: np.ndarray) -> None:
    """Raise ``ValueError`` where rows alone would take memory without measure."""
    need(shape[0] <= 8 * coded.size, f"{shape[0]} rows in {coded.size} bytes")


def _check_bits(packed: np.ndarray, count: int) -> None:
    need(packed.dtype == np.uint8 and packed.shape == ((count + 7) // 8,), "mask length")
    need(not (packed[-1:] & ((1 << -count % 8) - 1)).any(), "bits beyond the last entry")


def _decode_sign(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    signs = tensors.pop("signs")
    need(values.shape == (0,) and values.dtype.kind in "fc", "signs have no values")
    _check_bits(signs, shape[0] * shape[1])
    return SignFactor(values, signs, shape)


def _decode_csr(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    indptr, indices = _whole(tensors.pop("indptr"), 1), _whole(tensors.pop("indices"), 1)
    need(indptr.shape == (shape[0] + 1,) and values.shape == indices.shape, "array lengths")
    need(indptr[0] == 0 and indptr[-1] == indices.size, "row pointers")
    need(not (np.diff(indptr) < 0).any(), "row pointers decrease")
    need(not ((indices < 0) | (indices >= shape[1])).any(), "columns outside the matrix")
    places = np.repeat(np.arange(shape[0]) * shape[1], np.diff(indptr)) + indices
    need(np.unique(places).size == places.size, "a place comes twice")
    return SparseFactor(values, indices.astype(np.int32), indptr, shape[1])


def _decode_blocks(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    blocks = _whole(tensors.pop("blocks"), 2)
    need(blocks.shape[1] == 4, "blocks are not given by four numbers")
    r0, r1, c0, c1 = blocks.T
    inside = (r0 >= 0) & (r0 <= r1) & (r1 <= shape[0]) & (c0 >= 0) & (c0 <= c1) & (c1 <= shape[1])
    need(bool(inside.all()), "blocks outside the matrix")
    # In Python's integers: sums of hostile sizes could wrap around.
    area = sum((int(b) - int(a)) * (int(d) - int(c)) for a, b, c, d in blocks)
    need(values.shape == (area,), "values and blocks differ in number")
    need(not _overlap(blocks), "blocks overlap")
    return BlockSparseFactor(values, blocks, np.asarray(shape, dtype=np.int64))


def _overlap(blocks: np.ndarray) -> bool:
    """Whether any two blocks overlap.

    A sweep over the rows keeps the column spans of the current blocks sorted and compares each new
    one with its neighbours.
    """
    filled = blocks[(blocks[:, 0] < blocks[:, 1]) & (blocks[:, 2] < blocks[:, 3])]
    ends = [(int(r1), 0, int(c0), int(c1)) for _, r1, c0, c1 in filled]
    begins = [(int(r0), 1, int(c0), int(c1)) for r0, _, c0, c1 in filled]
    spans: list[tuple[int, int]] = []
    for _, is_begin, c0, c1 in sorted(ends + begins):
        at = bisect.bisect_left(spans, (c0, c1))
        if not is_begin:
            del spans[at]
        elif (at and spans[at - 1][1] > c0) or (at < len(spans) and spans[at][0] < c1):
            return True
        else:
            spans.insert(at, (c0, c1))
    return False


def _decode_selection(shape: tuple[int, int], values: np.ndarray, tensors: Tensors) -> Factor:
    index = _whole(tensors.pop("index"), 1)
    need(values.shape == (0,) and not ((index < -1) | (index >= shape[1])).any(), "index")
    kept = index[index >= 0]
    need(np.unique(kept).size == kept.size, "an entry is selected twice")
    return SelectionFactor(values, index, shape[1])


def _whole(array: np.ndarray, ndim: int) -> np.ndarray:
    need(array.ndim == ndim and array.dtype.kind in "iu", "positions are not whole numbers")
    return array.astype(np.int64)


_DECODERS: dict[str, Callable[[tuple[int, int], np.ndarray, Tensors], Factor]] = {
    "dense": _decode_dense,
    "bitmask": _decode_bitmask,
    "gaps": _decode_gaps,
    "csr": _decode_csr,
    "kronecker": _decode_kronecker,
    "blocks": _decode_blocks,
    "selection": _decode_selection,
    "sign": _decode_sign,
}
#: Names of all storages.
STORAGES = tuple(_DECODERS)
#: Storages whose values may be quantized.
_PATTERNS = _DECODERS.keys() - {"selection", "sign"}
