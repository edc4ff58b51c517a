"""Factors on disk: one safetensors file, no pickling, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save as to_bytes

from matfact import backend
from matfact._files import write_atomically
from matfact.backend import Array
from matfact.operators._block import BlockSparseFactor
from matfact.operators._csr import SparseFactor
from matfact.operators._dense import DenseFactor
from matfact.operators._factor import Factor
from matfact.operators._kronecker import KroneckerSparseFactor
from matfact.operators._selection import SelectionFactor

FORMAT_VERSION = 1
KINDS: dict[str, type[Factor]] = {
    cls.kind: cls
    for cls in (
        DenseFactor,
        SparseFactor,
        KroneckerSparseFactor,
        BlockSparseFactor,
        SelectionFactor,
    )
}


def save(factors: Sequence[Factor], path: Path) -> None:
    """Write `factors` to `path`; an earlier file stays whole until the new one is complete."""
    tensors: dict[str, np.ndarray] = {}
    for i, factor in enumerate(factors):
        tensors[f"{i}.values"] = np.asarray(_stored(factor), order="C")
        for name, positions in factor.positions.items():
            tensors[f"{i}.{name}"] = np.asarray(positions, order="C")  # which keeps numbers 0-D
    entries = [{"kind": f.kind, "complex": _is_complex(f.values)} for f in factors]
    manifest = {"format": "matfact", "version": FORMAT_VERSION, "factors": entries}
    content = to_bytes(tensors, metadata={"matfact": json.dumps(manifest)})
    write_atomically(path, content)


def _is_complex(values: Array) -> bool:
    return bool(backend.namespace(values).isdtype(values.dtype, "complex floating"))


def _stored(factor: Factor) -> np.ndarray:
    """Return the values as NumPy arrays of a dtype the format has.

    float16 is kept; bfloat16, unknown to NumPy, becomes float32; complex numbers become pairs of
    reals, along a last axis of length two.
    """
    values = backend.to_numpy(factor.values)
    if _is_complex(values):
        return np.stack([values.real, values.imag], axis=-1)
    is_float16 = str(factor.dtype).rpartition(".")[2] == "float16"
    return values.astype(np.float16) if is_float16 else values


def load(path: Path) -> list[Factor]:
    """Read the factors written by :func:`save`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            manifest = json.loads((file.metadata() or {}).get("matfact", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"path must name an intact safetensors file, got {path}: {error}"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("version") != FORMAT_VERSION:
        raise ValueError(f"path must name a matfact file of version {FORMAT_VERSION}, got {path}.")
    try:
        return [_rebuilt(i, entry, tensors) for i, entry in enumerate(manifest["factors"])]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"path must name a complete matfact file, but {path} lacks {error}."
        ) from None


def _rebuilt(i: int, entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> Factor:
    own = {
        name.partition(".")[2]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{i}.")
    }
    values = own.pop("values")
    if entry["complex"]:
        values = values[..., 0] + 1j * values[..., 1]
    return KINDS[entry["kind"]].from_positions(values, own)
