"""Conversion of a checkpoint to a safetensors file of dense tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from matfact import backend
from matfact._files import check_output, write_atomically
from matfact._safetensors import in_aligned_order, serialize, stored
from matfact.checkpoint._reader import Checkpoint
from matfact.operators import FactorProduct

#: Entries of a tensor computed at a time, whatever size it claims.
_ENTRIES = 1 << 22
_NUMPY = {"F16": np.float16, "BF16": np.float32, "F32": np.float32, "F64": np.float64,
          "C64": np.complex64}  # fmt: skip


def decompress(folder: str | Path, path: str | Path) -> None:
    """Write the dense tensors of a checkpoint to a safetensors file, atomically.

    Parameters
    ----------
    folder : str or Path
        The checkpoint.
    path : str or Path
        The file to write. An existing file stays intact until the new one is complete. It must not
        be a file of the checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If the checkpoint is damaged, the disk has too little space, or `path` is not allowed.
    """
    checkpoint, path = Checkpoint(folder), Path(path)
    check_output(path, checkpoint.files)
    specs = in_aligned_order({name: t.spec for name, t in checkpoint.tensors.items()})
    header = next(serialize(specs, (), checkpoint.metadata))
    needed = len(header) + sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free
    if needed > free:
        raise ValueError(
            f"{folder} must hold tensors that fit on the disk of {path}: they take {needed} "
            f"bytes, and {free} are free."
        )
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_product and tensor.spec.dtype not in _NUMPY:
            raise ValueError(f"{name!r} must be floating-point, got {tensor.spec.dtype}.")
    content = (chunk for name in specs for chunk in _dense(checkpoint, name))
    write_atomically(path, serialize(specs, content, checkpoint.metadata))


def _dense(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """Yield the bytes of one tensor."""
    tensor = checkpoint.tensors[name]
    if not tensor.is_product:
        yield from checkpoint.file(name).chunks(name)
        return
    dtype = tensor.spec.dtype
    for rows in _row_slabs(checkpoint.product(name)):
        yield stored(rows.astype(_NUMPY[dtype]), "BF16" if dtype == "BF16" else None)[1]


def _row_slabs(product: FactorProduct) -> Iterator[np.ndarray]:
    """Yield the rows of the product, a few at a time."""
    transposed = product.T
    n_rows = product.shape[0]
    widest = max(max(factor.shape) for factor in product.factors)
    step = max(1, _ENTRIES // widest)
    dtype = backend.compute_array(transposed.factors[-1].values).dtype
    for start in range(0, n_rows, step):
        rows = np.arange(start, min(start + step, n_rows))
        unit = np.zeros((n_rows, rows.size), dtype=dtype)
        unit[rows, rows - start] = 1
        yield np.ascontiguousarray((transposed @ unit).T)
