"""Writing of a checkpoint from files, one tensor at a time, so that it can be resumed."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import joblib

import matfact
from matfact._layers import matrix_shape
from matfact._parallel import results
from matfact._progress import Bar, Step
from matfact._safetensors_file import Located
from matfact.checkpoint._config import CONFIG
from matfact.checkpoint._journal import Journal
from matfact.checkpoint._manifest import Manifest, Shard
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._repository import Repository
from matfact.checkpoint._shards import shard_name, write_plain
from matfact.checkpoint._source import Source

_log = logging.getLogger(__name__)

#: Called with each file's entry and the number of files, starting with files of an earlier run;
#: or whether to show a bar.
Progress = bool | Callable[[Shard, int], None] | None
#: Writes one tensor to a file, possibly in another process.
Write = Callable[[Located, Path], Shard]


class _Task(NamedTuple):
    """A tensor to write, and its file."""

    tensor: Located
    path: Path
    work: float

    @classmethod
    def of(cls, tensor: Located, path: Path, work: Callable[[int, int], float]) -> Self:
        """Return the task with its work, in proportion to FLOPs."""
        return cls(tensor, path, work(*matrix_shape(tensor.spec.shape)))


def write_network(
    weights: Source,
    folder: str | Path,
    names: Sequence[str],
    notes: Mapping[str, str],
    settings: Mapping[str, Any],
    write: Write,
    n_jobs: int | None,
    progress: Progress,
    work: Callable[[int, int], float] = operator.mul,
    repository: Repository | None = None,
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
    progress : bool or callable
        Whether to show a bar, or a function called whenever a file is complete.
    work : callable
        Returns a number in proportion to the FLOPs of writing a matrix of so many rows and columns.
    repository : Repository, optional
        Of which the folder becomes a compressed copy.
    """
    bar = Bar(progress)
    output = Path(folder).absolute()  # workers may be elsewhere
    with bar, Journal(Path(folder)) as journal:  # before hashing the weights, which is slow
        generator = {"generator": f"matfact {matfact.__version__}"}
        config = {} if repository is None else {CONFIG: repository.sha256}
        settings = generator | dict(settings) | {"source": weights.digests() | config}
        journal.take_up(settings)
        if not journal.is_complete:
            tasks = [
                _Task.of(weights.location(name).absolute(), output / shard_name(i), work)
                for i, name in enumerate(names, start=1)
            ]
            shards = _run(weights, tasks, notes, write, journal, n_jobs, bar)
            if repository is not None:
                repository.complete(Path(folder), shards)
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
    bar: Bar,
) -> list[Shard]:
    """Write all missing files, and return all files in order."""
    names = [shard_name(0)] * bool(notes) + [task.path.name for task in tasks]
    left = [task for task in tasks if task.path.name not in journal.finished]
    work = {task.path.name: task.work for task in left}
    bar.expect([("", amount) for amount in work.values()], len(names))

    def tell(shard: Shard) -> None:
        _log.info("%s: %s is complete, %d files in all", journal.folder, shard.file, len(names))
        last = shard.tensors[-1]
        error, size = last.relative_error, math.prod(last.spec.shape)
        step = Step(last.name, work=work.get(shard.file, 0.0), error=error, entries=size)
        bar.advance(step, shard, len(names))

    def record(shard: Shard) -> None:
        journal.add(shard)
        tell(shard)

    for shard in journal.finished.values():
        tell(shard)
    if notes and shard_name(0) not in journal.finished:
        others = [name for name in weights.specs if name in notes]
        pieces = {n: (weights.specs[n], weights.location(n).chunks()) for n in others}
        record(write_plain(journal.folder / shard_name(0), pieces, notes))
    # Largest first, to balance the load of workers.
    left.sort(key=lambda task: -math.prod(task.tensor.spec.shape))
    with results(n_jobs, [joblib.delayed(write)(t.tensor, t.path) for t in left]) as written:
        for shard in written:
            record(shard)
    return [journal.finished[name] for name in names]
