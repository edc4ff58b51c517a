"""Conversion of a checkpoint to a safetensors file of dense tensors."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matfact import backend
from matfact._files import check_output, write_atomically
from matfact._safetensors import TensorSpec, in_aligned_order, serialize, stored
from matfact.checkpoint._reader import Checkpoint
from matfact.operators import FactorProduct, SparseFactor

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
    content = dense_content(checkpoint)
    check_space(content, path)
    write_atomically(path, content.serialized())


class DenseContent(NamedTuple):
    """Content of a safetensors file to write.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        The tensors.
    chunks : callable
        Yields the bytes of a tensor, given its name.
    metadata : mapping of str to str
        Metadata of the file.
    """

    specs: dict[str, TensorSpec]
    chunks: Callable[[str], Iterable[bytes]]
    metadata: Mapping[str, str]

    def serialized(self) -> Iterator[bytes]:
        """Yield the bytes of the file."""
        content = (chunk for name in self.specs for chunk in self.chunks(name))
        return serialize(self.specs, content, self.metadata)


def dense_content(checkpoint: Checkpoint) -> DenseContent:
    """Return the tensors of a checkpoint, those with factors as dense ones."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_product and tensor.spec.dtype not in _NUMPY:
            raise ValueError(f"{name!r} must be floating-point, got {tensor.spec.dtype}.")
    specs = in_aligned_order({name: t.spec for name, t in checkpoint.tensors.items()})
    return DenseContent(specs, functools.partial(_dense, checkpoint), checkpoint.metadata)


def check_space(content: DenseContent, path: Path) -> None:
    """Raise ``ValueError`` if the disk of `path` has too little space."""
    header = next(serialize(content.specs, (), content.metadata))
    needed = len(header) + sum(spec.nbytes for spec in content.specs.values())
    free = shutil.disk_usage(os.path.dirname(os.path.realpath(path))).free
    if needed > free:
        raise ValueError(
            f"The tensors must fit on the disk of {path}: they take {needed} bytes, and {free} are "
            "free."
        )


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
    """Yield the rows of the product, a few at a time; of one sparse factor, every bit."""
    first, *others = product.factors
    if not others and isinstance(first, SparseFactor) and first.is_ordered:
        yield from _scattered(first)
        return
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


def _scattered(factor: SparseFactor) -> Iterator[np.ndarray]:
    """Yield rows with the values put in place, without sums, which would lose negative zeros."""
    n_rows, n_columns = factor.shape
    step = max(1, _ENTRIES // max(1, n_columns))
    for start in range(0, n_rows, step):
        bounds = factor.indptr[start : start + step + 1]
        held = slice(bounds[0], bounds[-1])
        rows = np.zeros((len(bounds) - 1, n_columns), factor.values.dtype)
        places = np.repeat(np.arange(len(rows)), np.diff(bounds))
        rows[places, factor.indices[held]] = factor.values[held]
        yield rows
