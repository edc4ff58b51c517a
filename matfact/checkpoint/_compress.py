"""Factorization of the weights in a file into a checkpoint, one tensor at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone

from matfact import metrics
from matfact._layers import NOT_FINITE, matrix_shape
from matfact._safetensors import from_bfloat16, to_bfloat16
from matfact._safetensors_file import Located
from matfact._threads import single_threaded
from matfact.checkpoint._manifest import Shard, StoredTensor
from matfact.checkpoint._packed import wrapped
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._repository import Repository
from matfact.checkpoint._shards import write_shard
from matfact.checkpoint._source import Source
from matfact.checkpoint._writing import Progress, write_kept, write_network
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._at_bits import check_bits, fit_at_bits
from matfact.factorizers._settings import name_of
from matfact.operators import FactorProduct, QuantizedFactor
from matfact.operators._storage import pack

#: Start of the notes of tensors that were requested but cannot be factorized.
ASKED = "requested, but"


def compress(
    source: str | Path,
    folder: str | Path,
    factorizer: BaseFactorizer,
    *,
    layers: str | None = None,
    bits: float | None = None,
    n_jobs: int | None = None,
    progress: Progress = False,
) -> Checkpoint:
    """Factorize the weights in a safetensors file, and write a checkpoint.

    Tensors are read one at a time, so memory is bounded by the largest layer per job. If the work
    is stopped or killed, the same call resumes it: complete files are not written again, and the
    result is identical to the byte.

    Parameters
    ----------
    source : str or Path
        A ``.safetensors`` file, an index of several, or a folder with either. If a folder has both,
        ``model.safetensors`` is read. Weights in the formats ``sparse-bitmask`` and
        ``sparse-24-bitmask`` of compressed-tensors are read as dense ones. Or a ``.gguf`` file,
        whose quantized tensors are read as float32 (needs the extra ``gguf``). A repository of
        `transformers`, a folder that also has a ``config.json``, becomes one that
        ``from_pretrained`` reads after ``import matfact.transformers``, with the same tokenizer and
        configurations.
    folder : str or Path
        A new or empty folder for the checkpoint, or one with interrupted work to resume.
    factorizer : BaseFactorizer
        Estimator to fit to each layer. It is cloned, and seeded with 0 if it has a seed.
    layers : str, optional
        Regular expression to search in the names of the weights to factorize. By default the
        weights of all linear layers and 1-D, 2-D and 3-D convolutions, recognized by names, shapes
        and the other tensors of a layer. Other tensors are always copied, except those that only
        look like embeddings or normalizations by name: these are factorized if requested.
    bits : float, optional
        Bits a weight, positions and scales included; the header of a layer's file, about a
        kilobyte, comes on top. For each layer `factorizer` then gets the
        density and the bits of values with which its error is smallest. A layer for which they are
        too few is kept.
    n_jobs : int, optional
        Number of layers factorized in parallel; -1 for all cores. None means 1, or the setting of
        an enclosing ``joblib.parallel_config``, which may also select Dask or Ray. Workers read
        layers from `source` and write into `folder`, so all of them need access to both.
    progress : bool or callable, default=False
        Whether to show a bar with the layer, the time left and the error so far, in a terminal (on
        standard error) or a notebook; or a function, called as ``progress(shard, total)`` whenever
        a file is complete.

    Returns
    -------
    Checkpoint
        The result. The note of a kept tensor says why: it is not a weight, cannot be factorized, or
        would take more bytes.

    Raises
    ------
    FileNotFoundError
        If `source` does not exist.
    ImportError
        If a GGUF file is given and gguf is not installed.
    ValueError
        If an option is invalid, a file is damaged, or `folder` holds anything else.

    Warns
    -----
    UnreadIndexWarning
        If `source` holds ``model.safetensors`` and an index of other files.
    """
    weights, repository = Source(source), Repository.at(source)
    names, notes = _chosen(weights, layers, repository)
    factorizer = _seeded(factorizer)
    if bits is not None:
        check_bits(bits)
    fit = functools.partial(
        _factorize, factorizer=factorizer, bits=bits, is_wrapped=repository is not None
    )
    return write_network(
        weights, folder, names, notes, _settings(factorizer, layers, bits), fit, n_jobs, progress,
        work=factorizer.fit_work, repository=repository,
    )  # fmt: skip


def _chosen(
    weights: Source, layers: str | None, repository: Repository | None
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the layers to factorize, and why other tensors are kept."""
    kept = weights.kept
    if repository is not None:
        kept = repository.kept(weights.specs, kept)
    asked = list(weights.specs) if layers is None else _found(layers, weights)
    chosen = [n for n in asked if n not in kept or (kept[n].is_guess and layers is not None)]
    notes = {name: why.reason for name, why in kept.items()}
    if layers is not None:
        refused = [n for n in asked if n in kept and len(weights.specs[n].shape) > 1]
        notes |= {name: f"{ASKED} {notes[name]}" for name in refused}
        notes = dict.fromkeys(weights.specs, "not requested") | notes
    if not chosen and not any(name in weights.shared for name in asked):
        raise ValueError(f"layers={layers!r} names no weight. {_alternatives(weights, notes)}")
    for name in chosen:
        notes.pop(name, None)
    return chosen, notes


def _found(layers: str, weights: Source) -> list[str]:
    """Return the names that match `layers`."""
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"layers must be a regular expression, got {layers!r}: {error}.") from None
    return [name for name in weights.specs if pattern.search(name)]


def _alternatives(weights: Source, notes: Mapping[str, str]) -> str:
    """Return why requested tensors cannot be factorized, and which tensors can be."""
    refused = [f"{name}: {note}. " for name, note in notes.items() if note.startswith(ASKED)]
    names = weights.matrices()
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    there_are = f"There are {len(names)}: {shown}." if names else "The source has none."
    return "".join(refused[:3]) + there_are


def _seeded(factorizer: BaseFactorizer) -> BaseFactorizer:
    """Return a deterministic clone."""
    copy = clone(factorizer)
    if copy.get_params(deep=False).get("random_state", 0) is None:
        copy.set_params(random_state=0)
    copy._validate_params()
    return copy


def _settings(factorizer: BaseFactorizer, layers: str | None, bits: float | None) -> dict[str, Any]:
    """Return everything the result depends on, besides the weights."""
    parameters = factorizer.get_params(deep=False)
    plain = (str, int, float, bool, type(None))
    return {
        "method": name_of(factorizer),
        "parameters": {
            k: v if isinstance(v, plain) else repr(v) for k, v in sorted(parameters.items())
        },
        "layers": layers,
        **({} if bits is None else {"bits": bits}),
    }


def _factorize(
    tensor: Located, path: Path, factorizer: BaseFactorizer, bits: float | None, is_wrapped: bool
) -> Shard:
    """Write the factors of a layer, or the layer itself if it is smaller."""
    name, spec = tensor.name, tensor.spec
    W = tensor.read().reshape(matrix_shape(spec.shape))
    if not np.isfinite(W).all():
        return write_kept(tensor, path, NOT_FINITE)
    factorizer = clone(factorizer)
    with single_threaded():
        try:
            if bits is None:
                factorizer.fit(W)
            else:
                factorizer = fit_at_bits(factorizer, W, bits)
        except metrics.UnsuitableMatrix as error:
            return write_kept(tensor, path, str(error))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        product = factorizer.operator_
        if is_bfloat16 := spec.dtype == "BF16":
            product = _rounded(product)
        work = np.result_type(W.dtype, np.float32)
        error_of_stored = metrics.relative_error(W, product.astype(work).toarray())
    kinds, chunks = pack(product.factors, "BF16" if is_bfloat16 else None)
    content = list(chunks)
    if sum(map(len, content)) >= spec.nbytes:
        return write_kept(tensor, path, "its factors would take more bytes")
    held = StoredTensor(name, spec, kinds, name_of(factorizer), product.density, error_of_stored)
    return write_shard(path, wrapped(content, name) if is_wrapped else content, [held])


def _rounded(product: FactorProduct) -> FactorProduct:
    """Return the product with values that bfloat16 holds; scales of quantized ones stay as good."""
    return FactorProduct(
        [
            f
            if isinstance(f, QuantizedFactor)
            else f.with_values(from_bfloat16(to_bfloat16(f.values)))
            for f in product.factors
        ]
    )
