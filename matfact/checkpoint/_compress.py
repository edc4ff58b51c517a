"""Conversion of a safetensors file to a checkpoint of factors, one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.base import clone

import matfact
from matfact import metrics
from matfact._layers import NOT_FINITE, matrix_shape
from matfact._parallel import results
from matfact._safetensors import from_bfloat16, to_bfloat16
from matfact._safetensors_file import TensorLocation
from matfact._threads import single_threaded
from matfact.checkpoint._journal import Journal
from matfact.checkpoint._manifest import Manifest, Shard, StoredTensor
from matfact.checkpoint._packed import wrapped
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._repository import CONFIG, Repository
from matfact.checkpoint._shards import shard_name, write_plain, write_shard
from matfact.checkpoint._source import Source
from matfact.factorizers import BaseFactorizer
from matfact.operators import FactorProduct, QuantizedFactor
from matfact.operators._storage import pack

_log = logging.getLogger(__name__)

#: Start of the notes of tensors that were requested but cannot be factorized.
ASKED = "requested, but"

#: Called with each file's entry and the number of files, starting with files of an earlier run.
Progress = Callable[[Shard, int], None]


def compress(
    source: str | Path,
    folder: str | Path,
    factorizer: BaseFactorizer,
    *,
    layers: str | None = None,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Factorize the weights in a safetensors file, and write a checkpoint.

    Tensors are read one at a time, so memory is bounded by the largest layer per job. If the work
    is stopped or killed, the same call resumes it: complete files are not written again, and the
    result is identical to the byte.

    Parameters
    ----------
    source : str or Path
        A ``.safetensors`` file, an index of several, or a folder with either. If a folder has both,
        ``model.safetensors`` is read. A repository of `transformers`, a folder that also has a
        ``config.json``, becomes one that ``from_pretrained`` reads after ``import
        matfact.transformers``, with the same tokenizer and configurations.
    folder : str or Path
        A new or empty folder for the checkpoint, or one with interrupted work to resume.
    factorizer : BaseFactorizer
        Estimator to fit to each layer. It is cloned, and seeded with 0 if it has a seed.
    layers : str, optional
        Regular expression to search in the names of the weights to factorize. By default the
        weights of all linear layers and 1-D, 2-D and 3-D convolutions, recognized by names, shapes
        and the other tensors of a layer. Other tensors are always copied, except those that only
        look like embeddings or normalizations by name: these are factorized if requested.
    n_jobs : int, optional
        Number of layers factorized in parallel; -1 for all cores. None means 1, or the setting of
        an enclosing ``joblib.parallel_config``, which may also select Dask or Ray. Workers read
        layers from `source` and write into `folder`, so all of them need access to both.
    progress : callable, optional
        Called as ``progress(shard, total)`` whenever a file is complete.

    Returns
    -------
    Checkpoint
        The result. The note of a kept tensor says why: it is not a weight, cannot be factorized, or
        would take more bytes.

    Raises
    ------
    FileNotFoundError
        If `source` does not exist.
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
    output = Path(folder).absolute()  # workers may be elsewhere
    with Journal(Path(folder)) as journal:  # before hashing the weights, which is slow
        settings = _settings(weights, factorizer, layers, repository)
        journal.take_up(settings)
        if not journal.is_complete:
            tasks = [
                _Task(
                    _place(weights, name),
                    factorizer,
                    output / shard_name(i),
                    is_wrapped=repository is not None,
                )
                for i, name in enumerate(names, start=1)
            ]
            shards = _run(weights, tasks, notes, journal, n_jobs, progress)
            if repository is not None:
                repository.complete(Path(folder), shards)
            journal.complete(Manifest(tuple(shards), settings, weights.metadata))
    return Checkpoint(folder)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A layer to factorize, possibly in another process."""

    tensor: TensorLocation
    factorizer: BaseFactorizer
    path: Path
    is_wrapped: bool = False  #: in a tensor of bytes, as repositories hold them


def _place(weights: Source, name: str) -> TensorLocation:
    """Return the absolute location and checksum of a layer, for other processes."""
    file = weights.file(name)
    return file.location(name)._replace(path=file.path.absolute(), sha256=file.digest(name))


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


def _settings(
    weights: Source,
    factorizer: BaseFactorizer,
    layers: str | None,
    repository: Repository | None,
) -> dict[str, Any]:
    """Return everything the result depends on."""
    config = {} if repository is None else {CONFIG: repository.sha256}
    parameters = factorizer.get_params(deep=False)
    plain = (str, int, float, bool, type(None))
    return {
        "generator": f"matfact {matfact.__version__}",
        "method": type(factorizer).__name__,
        "parameters": {
            k: v if isinstance(v, plain) else repr(v) for k, v in sorted(parameters.items())
        },
        "layers": layers,
        "source": weights.digests() | config,
    }


def _run(
    weights: Source,
    tasks: Sequence[_Task],
    notes: Mapping[str, str],
    journal: Journal,
    n_jobs: int | None,
    progress: Progress | None,
) -> list[Shard]:
    """Write all missing files, and return all files in order."""
    names = [shard_name(0)] * bool(notes) + [task.path.name for task in tasks]

    def tell(shard: Shard) -> None:
        _log.info("%s: %s is complete, %d files in all", journal.folder, shard.file, len(names))
        if progress is not None:
            progress(shard, len(names))

    def record(shard: Shard) -> None:
        journal.add(shard)
        tell(shard)

    for shard in journal.finished.values():
        tell(shard)
    if notes and shard_name(0) not in journal.finished:
        others = [name for name in weights.specs if name in notes]
        pieces = {n: (weights.specs[n], weights.file(n).chunks(n)) for n in others}
        record(write_plain(journal.folder / shard_name(0), pieces, notes))
    left = [task for task in tasks if task.path.name not in journal.finished]
    # Largest first, to balance the load of workers.
    left.sort(key=lambda task: -math.prod(task.tensor.spec.shape))
    with results(n_jobs, [joblib.delayed(_factorize)(task) for task in left]) as written:
        for shard in written:
            record(shard)
    return [journal.finished[name] for name in names]


def _factorize(task: _Task) -> Shard:
    """Write the factors of a layer, or the layer itself if it is smaller."""
    name, spec = task.tensor.name, task.tensor.spec
    W = task.tensor.read().reshape(matrix_shape(spec.shape))
    if not np.isfinite(W).all():
        return _kept(task, NOT_FINITE)
    factorizer = clone(task.factorizer)
    with single_threaded():
        try:
            product = factorizer.fit(W).operator_
        except metrics.UnsuitableMatrix as error:
            return _kept(task, str(error))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if is_bfloat16 := spec.dtype == "BF16":
            product = _rounded(product)
        work = np.result_type(W.dtype, np.float32)
        error_of_stored = metrics.relative_error(W, product.astype(work).toarray())
    kinds, chunks = pack(product.factors, "BF16" if is_bfloat16 else None)
    content = list(chunks)
    if sum(map(len, content)) >= spec.nbytes:
        return _kept(task, "its factors would take more bytes")
    method = type(factorizer).__name__
    tensor = StoredTensor(name, spec, kinds, method, product.density, error_of_stored)
    return write_shard(task.path, wrapped(content, name) if task.is_wrapped else content, [tensor])


def _kept(task: _Task, reason: str) -> Shard:
    name = task.tensor.name
    pieces = {name: (task.tensor.spec, task.tensor.chunks())}
    return write_plain(task.path, pieces, {name: reason})


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
