"""Give a trained network factors in place of its weight matrices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack, cast, get_args

from joblib import Parallel, delayed
from torch import nn

from matfact import metrics
from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.report import CompressionReport, LayerReport
from matfact.torch._warnings import CompressionWarning
from matfact.torch.calibration._layer_statistics import LayerStatistics
from matfact.torch.calibration.batchnorm import reestimate_batch_norm
from matfact.torch.calibration.options import Adaptation, Calibration, CalibrationOptions
from matfact.torch.calibration.sequential import sequential_statistics
from matfact.torch.calibration.statistics import captured, layer_views
from matfact.torch.compression._fit import Fitted, fit_layer
from matfact.torch.compression._tasks import Layers, Method, Override, Position, Task, plan
from matfact.torch.compression._undo import Replaced, undone_on_error
from matfact.torch.compression.budget import Budget, named_methods, within_budget
from matfact.torch.layers._inherit import copied
from matfact.torch.layers._matricized import is_linear, other_matrices, replace
from matfact.torch.running._tensors import check_trainable, outside_inference_mode

#: What the package hands on from here.
__all__ = ["Compressed", "CompressionReport", "LayerReport", "compress"]

_log = logging.getLogger(__name__)

_Fit = Callable[..., tuple[Fitted | None, str]]
_Results = Generator[tuple[Task, Fitted | None]]


class Compressed(NamedTuple):
    """A compressed network and what was done to it."""

    model: nn.Module
    report: CompressionReport


@outside_inference_mode
def compress(
    model: nn.Module,
    method: Method | Sequence[Method] = "dsf",
    *,
    density: float | None = None,
    budget: float | Budget | None = None,
    layers: Layers | None = None,
    overrides: Mapping[str, Override] | None = None,
    keep: Sequence[Position] = (),
    calibration: Iterable[Any] | Calibration | None = None,
    n_jobs: int = 1,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Callable[[LayerReport, int], None] | None = None,
    **options: Unpack[CalibrationOptions],
) -> Compressed:
    """Factorize the linear layers and convolutions of a trained network.

    Works on any :class:`torch.nn.Module`: layers are found by their class, replaced by name, and
    their inputs are seen through hooks while the network's own code runs. A layer is taken only
    where it computes what its class in torch does, by a weight of a floating or complex dtype: the
    weight it computes with, if hooks or parametrizations make that from others. Other linear
    layers and convolutions are kept, with the reason in the report.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    method : str or BaseFactorizer, default="dsf"
        A factorizer, or its name in ``matfact.factorizers.METHODS``. With a budget, several: each
        layer then gets the one that suits it.
    density : float, optional
        Stored values ÷ entries of each layer, in (0, 1]. By default what the factorizer says.
    budget : float or Budget, optional
        What the selected layers may cost in all, kept ones included: bytes of values and
        positions, or their share of the dense bytes where it is at most 1. FLOPs and measured
        time are bounded by a :class:`Budget`. Each method is tried in each layer at a few
        densities first, so that layers which lose much can be given more.
    layers : str, collection of str or callable, optional
        A regular expression searched in layer names, the names themselves, or a function of name
        and module. By default all linear layers and convolutions in one to three dimensions.
    overrides : mapping of str to object, optional
        For layers of that name, or else the first regular expression found in their name: another
        method, another density, a pair of both, or None to keep the layer.
    keep : sequence of {"first", "last"}, default=()
        Keep the first or the last of the selected layers.
    calibration : iterable or Calibration, optional
        Batches of inputs, see :class:`Calibration`. The errors of layer outputs are lowered and
        reported.
    n_jobs : int, default=1
        Layers fitted at a time, by joblib; −1 for one on each core. Sequential calibration fits
        one after the other.
    inplace : bool, default=False
        Whether `model` itself is changed; otherwise it stays as it is and a copy is returned. Old
        layers are held until nothing can fail any more, their weights in files where there is an
        `offload_folder`; after an error the network is as it was.
    dry_run : bool, default=False
        Whether to report only which layers would be compressed, and how. With a budget the
        trials are made.
    progress : callable, optional
        Called with each finished row of the report and the number of layers.
    **options
        Fields of :class:`Calibration`, such as ``feedback=False``, for batches that are given
        alone.

    Returns
    -------
    model : torch.nn.Module
        The compressed network, with the training modes, hooks and frozen parameters of the old.
        One that is itself a layer is compressed as "0", the only one of a Sequential.
    report : CompressionReport
        One row for each selected layer.

    Raises
    ------
    ValueError
        If a parameter is invalid or names no layer, if no layer is selected, if a weight to be
        compressed is not in memory, or if the method fails on a layer, which is named. A layer is
        kept with a warning if its weight is complex and the method takes real ones only, or if
        the density is too small for its shape.

    Examples
    --------
    >>> from matfact.torch import compress
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> model = Sequential(Linear(64, 64), ReLU(), Linear(64, 8))
    >>> small, report = compress(model, "magnitude", density=0.25, keep=("last",))
    >>> small[0].to_product().nnz, [row.status for row in report]
    (1024, ['compressed', 'kept'])
    """
    given = Calibration.of(calibration, options)
    if given is not None and budget is not None:
        given = dataclasses.replace(given, batches=list(given.batches))  # used twice
    _check(budget, density, keep)
    is_layer = is_linear(model)
    if is_layer and inplace and not dry_run:
        raise ValueError(
            f"inplace must be False where the network itself is one layer, here a "
            f"{type(model).__name__}: nothing can take its place in itself."
        )
    original = model
    if not (inplace or dry_run):
        model = copied(model)
    elif inplace:
        check_trainable(model)
    if is_layer:
        model = nn.Sequential(model)  # in which it can be replaced
    metadata: dict[str, Any] = {"method": str(method), "density": density, "steps": []}
    metadata["untouched"] = other_matrices(model)
    if budget is not None:
        overrides, metadata["budget"] = _shared_out(
            model, method, budget, layers=layers, overrides=overrides or {}, keep=keep,
            calibration=given and given.batches, n_jobs=n_jobs,
        )  # fmt: skip
        method = next(iter(named_methods(method).values()))
    tasks = plan(model, cast(Method, method), density, layers, overrides or {}, keep)
    todo = [task for task in tasks if task.factorizer is not None]
    rows = {task.names[0]: task.report("kept" if task.factorizer is None else "planned")
            for task in tasks}  # fmt: skip
    if dry_run:
        return Compressed(original, CompressionReport(rows.values(), metadata))
    _warn_of_none(tasks)
    folder = None if given is None else given.folder
    with undone_on_error(model, folder) if inplace else contextlib.nullcontext() as replaced:
        fits = _fits(model, todo, given, n_jobs)
        for row in _finished(model, todo, fits, replaced, progress):
            rows[row.layer] = row
        if given is not None:
            metadata["steps"].append(given.step)
            if given.reestimate_batchnorm:
                n_layers = reestimate_batch_norm(model, given.batches)
                metadata["steps"].append(f"batch-norm statistics of {n_layers} layers re-estimated")
    model = model.get_submodule("0") if is_layer else model
    return Compressed(model, CompressionReport(rows.values(), metadata))


def _check(budget: Any, density: Any, keep: Any) -> None:
    """Raise ``ValueError`` if a parameter is invalid."""
    if budget is not None and density is not None:
        raise ValueError(f"density must be None with a budget, got {density}.")
    if isinstance(keep, str) or not {*keep} <= {*get_args(Position)}:
        raise ValueError(f"keep must hold names among {get_args(Position)}, got {keep!r}.")


def _warn_of_none(tasks: list[Task]) -> None:
    """Say so where nothing can be compressed of what has been selected."""
    if all(task.view is None for task in tasks):
        first = tasks[0]
        message = f"no selected layer can be compressed; {first.names[0]} is kept: {first.message}."
        warnings.warn(message, CompressionWarning, stacklevel=4)


def _finished(
    model: nn.Module,
    tasks: list[Task],
    fits: _Results,
    replaced: Replaced | None,
    progress: Callable[[LayerReport, int], None] | None,
) -> list[LayerReport]:
    """Return the rows of all tasks, whose layers have been replaced, in the modes they had."""
    modes = {name: model.get_submodule(name).training for task in tasks for name in task.names[:1]}
    rows = []
    # Closed also where `progress` fails, so that no batch is left waiting in the network.
    with contextlib.closing(_installed(model, fits, replaced)) as done:
        for row in done:
            rows.append(row)
            _log.info("%s: %s, %d layers in all", row.layer, row.status, len(tasks))
            if progress is not None:
                progress(row, len(tasks))
    for name, training in modes.items():
        model.get_submodule(name).train(training)
    return rows


def _fits(
    model: nn.Module, tasks: list[Task], calibration: Calibration | None, n_jobs: int
) -> _Results:
    """Yield each task with its fit; None where the method cannot take the layer."""
    fit: _Fit = _try
    statistics: Mapping[str, LayerStatistics] = {}
    if calibration is not None:
        fit = functools.partial(_try, adapt=calibration.adapt, shift_bias=calibration.shift_bias)
        if calibration.sequential:
            yield from _sequential_fits(model, tasks, fit, calibration)
            return
        views = layer_views(model, [task.names[0] for task in tasks if _is_real(task)])
        statistics = captured(model, calibration.batches, views)
        for task in tasks:
            _note_lack(task, statistics.get(task.names[0]))
    run = Parallel(n_jobs=n_jobs, return_as="generator")
    named = ((task.names[0], task) for task in tasks)
    jobs = (delayed(fit)(name, *task.problem(), statistics.get(name)) for name, task in named)
    for task, (fitted, message) in zip(tasks, run(jobs), strict=True):
        task.message = message or task.message
        yield task, fitted


def _sequential_fits(
    model: nn.Module, tasks: list[Task], fit: _Fit, calibration: Calibration
) -> _Results:
    by_name = {task.names[0]: task for task in tasks}
    real = [name for name, task in by_name.items() if _is_real(task)]
    batches, paired = calibration.batches, calibration.feedback
    stops = sequential_statistics(model, real, batches, paired=paired, folder=calibration.folder)
    with contextlib.closing(stops):
        for name, statistics in stops:
            task = by_name.pop(name)
            yield task, _fitted(task, fit, statistics)
            del statistics  # memory
    for task in by_name.values():
        yield task, _fitted(task, fit, None)


def _fitted(task: Task, fit: _Fit, statistics: LayerStatistics | None) -> Fitted | None:
    _note_lack(task, statistics)
    fitted, message = fit(task.names[0], *task.problem(), statistics)
    task.message = message or task.message
    return fitted


def _is_real(task: Task) -> bool:
    assert task.view is not None  # of what is fitted
    return not any(matrix.is_complex() for matrix in task.view.matrices())


def _note_lack(task: Task, statistics: LayerStatistics | None) -> None:
    """Say of a layer what its calibration lacks, if anything."""
    if statistics is not None and not statistics.is_empty:
        task.message = statistics.note
        return
    if not _is_real(task):
        why = "its inputs are complex"
    elif task.kind == "NonDynamicallyQuantizableLinear":
        why = "attention reads its weight and never calls it, so that its inputs are unknown"
    else:
        why = "no calibration input reached it"
    task.message = f"{why}: fitted without"
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
) -> tuple[Fitted | None, str]:
    """Return the fit of the layer `name`, or None and why there is none."""
    try:
        shift = shift_bias and has_bias
        return fit_layer(factorizer, matrices, statistics, adapt, shift=shift), ""
    except metrics.UnsuitableMatrix as error:
        return None, str(error)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _installed(
    model: nn.Module, fits: _Results, replaced: Replaced | None
) -> Generator[LayerReport]:
    """Put factorized layers in place of dense ones as they come, and report."""
    with contextlib.closing(fits):
        for task, fitted in fits:
            if fitted is None:
                message = f"{task.names[0]} is kept: {task.message}"
                warnings.warn(message, CompressionWarning, stacklevel=4)
                row = task.report("kept")
            else:
                assert task.view is not None
                if replaced is not None:
                    replaced.add(task.names, task.view.layer)
                replace(model, task.names, task.view, fitted.products, fitted.shifts)
                if replaced is not None:
                    replaced.page_out()
                row = task.report("compressed", fitted)
            # With the layer as it was, and all that is in the new one by now.
            task.view = None
            del fitted
            yield row


def _shared_out(
    model: nn.Module, method: Method | Sequence[Method], budget: float | Budget, **options: Any
) -> tuple[dict[str, Override], dict[str, Any]]:
    """Return overrides that keep the budget, and what is to be reported of it."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    allocation, chosen = within_budget(model, budget, named_methods(method), **options)
    facts = {"cost": budget.cost, "ceiling": allocation.budget, "planned": allocation.cost}
    return {**options["overrides"], **chosen}, facts
