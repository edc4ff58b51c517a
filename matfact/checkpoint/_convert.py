"""Exact conversion of sparse weights to a checkpoint, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from matfact._layers import NOT_FINITE, matrix_shape
from matfact._safetensors_file import Located
from matfact.checkpoint._manifest import MANIFEST, Shard, StoredTensor
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._repository import check_config
from matfact.checkpoint._shards import write_shard
from matfact.checkpoint._source import Source
from matfact.checkpoint._writing import Progress, write_kept, write_network
from matfact.operators import SparseFactor
from matfact.operators._storage import pack


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Store weights with many zeros as sparse factors, exactly, and write a checkpoint.

    Each weight becomes one factor with the entries that are not zero. A negative zero is stored
    like other values, so :func:`decompress` gives back every bit. Tensors are read one at a time.
    If the work is stopped or killed, the same call resumes it.

    Parameters
    ----------
    source : str or Path
        Anything that :func:`compress` reads: dense weights with zeros, or weights in the formats
        ``sparse-bitmask`` and ``sparse-24-bitmask`` of compressed-tensors. The ``config.json`` of a
        folder must not describe quantized weights.
    folder : str or Path
        A new or empty folder for the checkpoint, or one with interrupted work to resume.
    n_jobs, progress
        As in :func:`compress`.

    Returns
    -------
    Checkpoint
        The result. The note of a kept tensor says why: it is not a weight of a linear layer or
        convolution, or has too few zeros.

    Raises
    ------
    FileNotFoundError
        If `source` does not exist.
    ImportError
        If a GGUF file is given and gguf is not installed.
    ValueError
        If a file is damaged, the weights are quantized, or `folder` holds anything else.

    See Also
    --------
    decompress : Writes dense weights.
    """
    source = Path(source)
    if (source / MANIFEST).is_file():
        raise ValueError(f"source must not be a checkpoint already, but {source} holds one.")
    weights = Source(source)
    check_config(source)
    notes = {name: kept.reason for name, kept in weights.kept.items()}
    names, settings = weights.matrices(), {"conversion": "exact"}
    return write_network(weights, folder, names, notes, settings, _store, n_jobs, progress)


def _store(tensor: Located, path: Path) -> Shard:
    """Write a weight as a sparse factor, or unchanged if that takes fewer bytes."""
    W = tensor.read().reshape(matrix_shape(tensor.spec.shape))
    if not np.isfinite(W).all():
        return write_kept(tensor, path, NOT_FINITE)
    factor = SparseFactor.from_dense(W, W.view(f"u{W.itemsize}") != 0)  # negative zeros too
    kinds, chunks = pack([factor], "BF16" if tensor.spec.dtype == "BF16" else None)
    content = list(chunks)
    if sum(map(len, content)) >= tensor.spec.nbytes:
        share = 1 - factor.nnz / W.size
        return write_kept(tensor, path, f"too few zeros ({share:.1%}) to take fewer bytes")
    held = StoredTensor(
        tensor.name, tensor.spec, kinds, density=factor.nnz / W.size, relative_error=0.0
    )
    return write_shard(path, content, [held])
