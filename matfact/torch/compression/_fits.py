"""Fits of the layers of a network, one after the other or in parallel."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Mapping

from joblib import Parallel, delayed
from torch import nn

from matfact import metrics
from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.torch._warnings import CompressionWarning
from matfact.torch.calibration._layer_statistics import LayerStatistics
from matfact.torch.calibration._match import Matched
from matfact.torch.calibration.options import Adaptation, Calibration
from matfact.torch.calibration.sequential import sequential_statistics
from matfact.torch.calibration.statistics import captured, layer_views
from matfact.torch.compression._fit import Fitted, fit_layer
from matfact.torch.compression._resume import Outcome, Parts
from matfact.torch.compression._tasks import Task

_Fit = Callable[..., tuple[str, Outcome]]
#: Tasks with their fits.
Results = Generator[tuple[Task, Fitted | None]]


def fits(
    model: nn.Module,
    tasks: list[Task],
    calibration: Calibration | None,
    n_jobs: int,
    parts: Parts,
    matched: Callable[[Matched], None],
) -> Results:
    """Yield each task with its fit, or None if the method cannot handle the layer.

    Parameters
    ----------
    model : torch.nn.Module
        The network, in which the caller replaces each layer.
    tasks : list of Task
        The layers to fit.
    calibration : Calibration, optional
        Inputs of the network, and how to use them.
    n_jobs : int
        Number of layers fitted in parallel.
    parts : Parts
        What an earlier run has finished, and gets what this one does.
    matched : callable
        Called with the result for each block that is trained.
    """
    fit: _Fit = _try
    statistics: Mapping[str, LayerStatistics] = {}
    known = parts.layers
    left = [task for task in tasks if task.names[0] not in known]
    if calibration is not None:
        fit = functools.partial(_try, adapt=calibration.adapt, shift_bias=calibration.shift_bias)
        if calibration.sequential:
            yield from _sequential_fits(model, tasks, fit, calibration, parts, matched)
            return
        views = layer_views(model, [task.names[0] for task in left if _is_real(task)])
        statistics = captured(model, calibration.batches, views) if left else {}
        for task in left:
            _note_lack(task, statistics.get(task.names[0]))
    for task in tasks:
        if task.names[0] in known:
            yield task, _fitted(task, fit, None, parts)
    by_name = {task.names[0]: task for task in left}
    run = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    jobs = (
        delayed(fit)(name, *task.problem(), statistics.get(name)) for name, task in by_name.items()
    )
    for name, outcome in run(jobs):
        yield by_name[name], _kept(by_name[name], outcome, parts)


def _sequential_fits(
    model: nn.Module,
    tasks: list[Task],
    fit: _Fit,
    calibration: Calibration,
    parts: Parts,
    matched: Callable[[Matched], None],
) -> Results:
    by_name = {task.names[0]: task for task in tasks}
    real = [name for name, task in by_name.items() if _is_real(task)]

    def match(name: str, train: Callable[[], Matched]) -> None:
        matched(parts.matched(model, name, train))

    stops = sequential_statistics(
        model, real, calibration.batches, paired=calibration.feedback, folder=calibration.folder,
        known=parts.layers, match=match if calibration.match_blocks else None,
    )  # fmt: skip
    with contextlib.closing(stops):
        for name, statistics in stops:
            task = by_name.pop(name)
            yield task, _fitted(task, fit, statistics, parts)
            del statistics  # memory
    for task in by_name.values():
        yield task, _fitted(task, fit, None, parts)


def _fitted(
    task: Task, fit: _Fit, statistics: LayerStatistics | None, parts: Parts
) -> Fitted | None:
    """Return the fit of a layer, of an earlier run if there is one."""
    name = task.names[0]
    if (earlier := parts.fit(name)) is not None:
        fitted, task.message = earlier
        return fitted
    _note_lack(task, statistics)
    return _kept(task, fit(name, *task.problem(), statistics)[1], parts)


def _kept(task: Task, outcome: Outcome, parts: Parts) -> Fitted | None:
    """Store the outcome of a new fit."""
    fitted, message = outcome
    task.message = message or task.message
    parts.add_fit(task.names[0], (fitted, task.message))
    return fitted


def _is_real(task: Task) -> bool:
    assert task.view is not None  # fitted layers have a view
    return not any(matrix.is_complex() for matrix in task.view.matrices())


def _note_lack(task: Task, statistics: LayerStatistics | None) -> None:
    """Note why a layer has no calibration, if it has none."""
    if statistics is not None and not statistics.is_empty:
        task.message = statistics.note
        return
    if not _is_real(task):
        why = "its inputs are complex"
    elif task.kind == "NonDynamicallyQuantizableLinear":
        why = "its inputs are unknown, since attention reads its weight without calling it"
    else:
        why = "no calibration input reached it"
    task.message = f"{why}: fitted without calibration"
    warnings.warn(f"{task.names[0]}: {task.message}.", CompressionWarning, stacklevel=4)


def _try(
    name: str,
    factorizer: BaseFactorizer,
    matrices: list[Array],
    has_bias: bool,
    statistics: LayerStatistics | None,
    *,
    adapt: Adaptation = "none",
    shift_bias: bool = False,
) -> tuple[str, Outcome]:
    """Return `name`, and the fit of the layer, or None and the reason."""
    try:
        shift = shift_bias and has_bias
        return name, (fit_layer(factorizer, matrices, statistics, adapt, shift=shift), "")
    except metrics.UnsuitableMatrix as error:
        return name, (None, str(error))
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
