"""Quantized values as tensors: packed codes, their levels, and the scales of groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from matfact import backend
from matfact._safetensors import is_sizes
from matfact.operators._coding import need, packed, unpacked
from matfact.operators._factor import Factor
from matfact.operators._quantized import BITS, LARGEST_GROUP, QuantizedFactor, group_counts

#: Dtypes that values may have, by their names in files; bfloat16 arrives as float32.
_DTYPES = {"F16": np.float16, "BF16": np.float32, "F32": np.float32, "F64": np.float64}
#: The levels of codes of 8 bits, which files do not repeat.
_ALL = np.arange(-127, 128, dtype=np.int8)
#: Largest power of two that scales are divided by.
_LARGEST_UNIT = 1100


def encode_levels(factor: QuantizedFactor, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what says how values are to be decoded, as numbers of `dtype`, and their tensors.

    Raises
    ------
    ValueError
        If the factor cannot be stored.
    """
    values = backend.to_numpy(factor.values)
    levels = _ALL if factor.bits == BITS[-1] else np.unique(values)
    _check(factor.bits, factor.group_size, levels)
    unit, scales = _stored_scales(backend.to_numpy(factor.scales))
    fields = {
        "bits": int(factor.bits),
        "group_size": None if factor.group_size is None else int(factor.group_size),
        "unit": unit,
        "dtype": dtype,
        "shape": list(values.shape),
    }
    codes = np.searchsorted(levels, values.reshape(-1)).astype(np.uint8)
    tensors = {"values": packed(codes, factor.bits), "scales": scales}
    return fields, tensors if levels is _ALL else tensors | {"levels": levels}


def decode_levels(fields: Any, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the level of each value, in the shape that the pattern uses."""
    need(isinstance(fields, dict), "quantized is no JSON object")
    shape = fields["shape"]
    levels = _ALL if fields["bits"] == BITS[-1] else tensors.pop("levels")
    need(is_sizes(shape) and len(shape) <= 4, "the shape of quantized values is not a few sizes")
    _check(fields["bits"], fields["group_size"], levels)
    codes = unpacked(tensors.pop("values"), fields["bits"], math.prod(shape))
    need(not codes.size or int(codes.max()) < levels.size, "codes go beyond the levels")
    return levels[codes].reshape(shape)


def decode_scales(fields: dict[str, Any], pattern: Factor, scales: np.ndarray) -> QuantizedFactor:
    """Return the factor whose levels `pattern` holds."""
    unit, group_size, dtype = fields["unit"], fields["group_size"], fields["dtype"]
    need(isinstance(dtype, str) and dtype in _DTYPES, f"quantized values of dtype {dtype!r}")
    need(type(unit) is int and abs(unit) <= _LARGEST_UNIT, f"a unit of 2**{unit!r}")
    need(scales.dtype.kind == "f" and scales.ndim == 1, "scales are not a vector of floats")
    n_groups = int(group_counts(pattern, group_size)[1].sum())
    need(scales.size == n_groups, f"{scales.size} scales for {n_groups} groups")
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = np.ldexp(scales.astype(np.float64), unit).astype(_DTYPES[dtype])
    need(bool(np.isfinite(decoded).all()), "scales are not finite")
    return QuantizedFactor(pattern.values, decoded, fields["bits"], group_size, pattern)


def _check(bits: Any, group_size: Any, levels: np.ndarray) -> None:
    """Raise ``ValueError`` unless files can hold such levels."""
    need(_is_whole(bits) and bits in BITS, f"codes of {bits!r} bits; there may be 2 to 8")
    need(
        group_size is None or (_is_whole(group_size) and 1 <= group_size <= LARGEST_GROUP),
        f"a group size of {group_size!r}; there may be None or 1 to {LARGEST_GROUP}",
    )
    need(levels.dtype == np.int8 and levels.ndim == 1, "levels are not a vector of int8")
    need(levels.size <= 2**bits, f"{levels.size} levels; {bits} bits tell {2**bits} apart")
    need(bool((levels[1:] > levels[:-1]).all()), "levels do not increase")
    need(not (levels == -128).any(), "a level of -128; the least is -127")


def _is_whole(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _stored_scales(scales: np.ndarray) -> tuple[int, np.ndarray]:
    """Return an exponent, and the scales divided by that power of two, in 16 bits if none is lost.

    Scales of any other kind take 32 bits, or 64, and come back as they were too.
    """
    exact = scales.astype(np.float64)
    need(bool(np.isfinite(exact).all()), "scales are not finite")
    # The largest then lies in [2**14, 2**15), as far from overflow as from what is subnormal.
    unit = int(np.frexp(np.abs(exact).max(initial=0))[1]) - 15 if exact.any() else 0
    with np.errstate(over="ignore", under="ignore"):
        for exponent, dtype in ((unit, np.float16), (0, np.float32)):
            narrow = np.ldexp(exact, -exponent).astype(dtype)
            if np.array_equal(np.ldexp(narrow.astype(np.float64), exponent), exact):
                return exponent, narrow
    return 0, exact
