"""Exact conversion of sparse weights to a checkpoint, one tensor at a time."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from matfact._layers import NOT_FINITE, matrix_shape
from matfact._safetensors_file import Located
from matfact.checkpoint._config import check_config
from matfact.checkpoint._manifest import MANIFEST, Shard, StoredTensor
from matfact.checkpoint._packed import wrapped
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._repository import Repository
from matfact.checkpoint._shards import write_shard
from matfact.checkpoint._source import Source
from matfact.checkpoint._writing import Progress, write_kept, write_network
from matfact.operators import SparseFactor
from matfact.operators._storage import pack

#: Share of zeros below which a sparse factor is slower than the dense weight, and hardly smaller.
LEAST_ZEROS = 0.25


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    negative_zeros: bool = True,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Store weights with many zeros as sparse factors, exactly, and write a checkpoint.

    Each weight becomes one factor with the entries that are not zero. `to_dense` gives back
    every bit. Tensors are read one at a time. If the work is stopped or killed, the same call
    resumes it.

    Parameters
    ----------
    source : str or Path
        Anything that `compress` reads: dense weights with zeros, or weights in the formats
        ``sparse-bitmask`` and ``sparse-24-bitmask`` of compressed-tensors. The ``config.json`` of a
        folder must not describe quantized weights; with one, the checkpoint too is a repository
        that ``from_pretrained`` reads after ``import matfact.transformers``.
    folder : str or Path
        A new or empty folder for the checkpoint, or one with interrupted work to resume.
    negative_zeros : bool, default=True
        Whether to store negative zeros like other values. Weights that were multiplied by a mask
        have many. Without them, they come back as positive zeros; all products stay the same.
    n_jobs, progress
        As in `compress`.

    Returns
    -------
    Checkpoint
        The result. The note of a kept tensor says why: it is not a weight of a linear layer or
        convolution, fewer than a quarter of its entries are zero, or the factor would take more
        bytes.

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
    repository = Repository.at(source)
    kept = weights.kept if repository is None else repository.kept(weights.specs, weights.kept)
    names = [name for name in weights.specs if name not in kept]
    notes = {name: why.reason for name, why in kept.items()}
    settings = {"conversion": "sparse", "negative_zeros": negative_zeros}
    store = functools.partial(
        _store, negative_zeros=negative_zeros, is_wrapped=repository is not None
    )
    return write_network(
        weights, folder, names, notes, settings, store, n_jobs, progress, repository=repository
    )


def _store(tensor: Located, path: Path, negative_zeros: bool, is_wrapped: bool) -> Shard:
    """Write a weight as a sparse factor, or unchanged if that takes fewer bytes."""
    W = tensor.read().reshape(matrix_shape(tensor.spec.shape))
    if not np.isfinite(W).all():
        return write_kept(tensor, path, NOT_FINITE)
    is_nonzero = W != 0
    has_bits = W.view(f"u{W.itemsize}") != 0  # negative zeros too
    factor = SparseFactor.from_dense(W, has_bits if negative_zeros else is_nonzero)
    kinds, chunks = pack([factor], "BF16" if tensor.spec.dtype == "BF16" else None)
    content = list(chunks)
    is_smaller = sum(map(len, content)) < tensor.spec.nbytes
    if not is_smaller or factor.nnz > (1 - LEAST_ZEROS) * W.size:
        zeros, negative = (1 - n.mean() for n in (is_nonzero, is_nonzero | ~has_bits))
        shown = f"{zeros:.1%}" + (f", of these {negative / zeros:.1%} negative" if negative else "")
        return write_kept(tensor, path, f"too few zeros ({shown})")
    held = StoredTensor(
        tensor.name, tensor.spec, kinds, density=factor.nnz / W.size, relative_error=0.0
    )
    return write_shard(path, wrapped(content, held.name) if is_wrapped else content, [held])
