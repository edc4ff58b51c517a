"""Factors on disk: one safetensors file, no pickling, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save as to_bytes

from matfact import backend
from matfact._files import write_atomically
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
        tensors[f"{i}.values"] = np.ascontiguousarray(_stored(factor))
        for name, positions in factor.positions.items():
            tensors[f"{i}.{name}"] = np.ascontiguousarray(positions)
    manifest = {"format": "matfact", "version": FORMAT_VERSION, "kinds": [f.kind for f in factors]}
    content = to_bytes(tensors, metadata={"matfact": json.dumps(manifest)})
    write_atomically(path, content)


def _stored(factor: Factor) -> np.ndarray:
    """Return the values as NumPy, float16 kept (bfloat16, unknown to NumPy, as float32)."""
    values = backend.to_numpy(factor.values)
    is_float16 = str(factor.dtype).rpartition(".")[2] == "float16"
    return values.astype(np.float16) if is_float16 else values


def load(path: Path) -> list[Factor]:
    """Read the factors written by :func:`save`."""
    with safetensors.safe_open(path, framework="numpy") as file:
        manifest = json.loads((file.metadata() or {}).get("matfact", "{}"))
        if manifest.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"path must name a matfact file of version {FORMAT_VERSION}, but {path} has "
                f"version {manifest.get('version')!r}."
            )
        names = list(file.keys())
        factors = []
        for i, kind in enumerate(manifest["kinds"]):
            tensors = {
                name.partition(".")[2]: file.get_tensor(name)
                for name in names
                if name.startswith(f"{i}.")
            }
            values = tensors.pop("values")
            factors.append(KINDS[kind].from_positions(values, tensors))
    return factors
