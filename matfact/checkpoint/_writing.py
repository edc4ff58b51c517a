"""Writing of a checkpoint from files, one tensor at a time, so that it can be resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib

import matfact
from matfact._parallel import results
from matfact._safetensors_file import Located
from matfact.checkpoint._journal import Journal
from matfact.checkpoint._manifest import Manifest, Shard
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._shards import shard_name, write_plain
from matfact.checkpoint._source import Source

_log = logging.getLogger(__name__)

#: Called with each file's entry and the number of files, starting with files of an earlier run.
Progress = Callable[[Shard, int], None]
#: Writes one tensor to a file, possibly in another process.
Write = Callable[[Located, Path], Shard]


class _Task(NamedTuple):
    """A tensor to write, and its file."""

    tensor: Located
    path: Path


def write_network(
    weights: Source,
    folder: str | Path,
    names: Sequence[str],
    notes: Mapping[str, str],
    settings: Mapping[str, Any],
    write: Write,
    n_jobs: int | None,
    progress: Progress | None,
) -> Checkpoint:
    """Write a checkpoint, or take up the interrupted writing of one.

    Parameters
    ----------
    weights : Source
        The tensors.
    folder : str or Path
        A new or empty folder, or one with interrupted work of the same settings and weights.
    names : sequence of str
        Tensors that `write` gets, each for a file of its own.
    notes : mapping of str to str
        Other tensors, which are copied, and why.
    settings : mapping
        What the result depends on, besides the weights.
    write : callable
        Writes one tensor.
    n_jobs : int, optional
        Number of tensors written in parallel.
    progress : callable, optional
        Called whenever a file is complete.
    """
    output = Path(folder).absolute()  # workers may be elsewhere
    with Journal(Path(folder)) as journal:  # before hashing the weights, which is slow
        generator = {"generator": f"matfact {matfact.__version__}"}
        settings = generator | dict(settings) | {"source": weights.digests()}
        journal.take_up(settings)
        if not journal.is_complete:
            tasks = [
                _Task(weights.location(name).absolute(), output / shard_name(i))
                for i, name in enumerate(names, start=1)
            ]
            shards = _run(weights, tasks, notes, write, journal, n_jobs, progress)
            journal.complete(Manifest(tuple(shards), settings, weights.metadata))
    return Checkpoint(folder)


def write_kept(tensor: Located, path: Path, reason: str) -> Shard:
    """Write a tensor unchanged, with the reason."""
    return write_plain(path, {tensor.name: (tensor.spec, tensor.chunks())}, {tensor.name: reason})


def _run(
    weights: Source,
    tasks: Sequence[_Task],
    notes: Mapping[str, str],
    write: Write,
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
        pieces = {n: (weights.specs[n], weights.location(n).chunks()) for n in others}
        record(write_plain(journal.folder / shard_name(0), pieces, notes))
    left = [task for task in tasks if task.path.name not in journal.finished]
    # Largest first, to balance the load of workers.
    left.sort(key=lambda task: -math.prod(task.tensor.spec.shape))
    with results(n_jobs, [joblib.delayed(write)(*task) for task in left]) as written:
        for shard in written:
            record(shard)
    return [journal.finished[name] for name in names]
