"""Compression of a trained network."""

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
from matfact._progress import Bar, Step
from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.report import CompressionReport, LayerReport
from matfact.torch._attached import attached
from matfact.torch._warnings import CompressionWarning
from matfact.torch.calibration._layer_statistics import LayerStatistics
from matfact.torch.calibration._match import Matched, summary
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

#: Re-exported names.
__all__ = ["Compressed", "CompressionReport", "LayerReport", "compress"]

_log = logging.getLogger(__name__)

_Fit = Callable[..., tuple[Fitted | None, str]]
_Results = Generator[tuple[Task, Fitted | None]]


class CompressOptions(CalibrationOptions, total=False):
    """Further keywords of :func:`compress`."""

    value_bits: int | None


class Compressed(NamedTuple):
    """A compressed network and its report."""

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
    progress: bool | Callable[[LayerReport, int], None] | None = False,
    **options: Unpack[CompressOptions],
) -> Compressed:
    """Factorize the linear layers and convolutions of a trained network.

    Works on any :class:`torch.nn.Module`. Layers are found by class and replaced by name; hooks
    record their inputs while the network runs its own code. A layer is compressed if it computes
    what its torch class does, with a floating or complex weight. If hooks or parametrizations
    compute the weight, the computed weight is factorized. Other linear layers and convolutions are
    kept, and the report says why.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    method : str or BaseFactorizer, default="dsf"
        A factorizer, or its name in ``matfact.factorizers.METHODS``. With a budget, several
        methods can be given, and each layer gets the best of them.
    density : float, optional
        Stored values ÷ entries of each layer, in (0, 1]. By default that of the factorizer; it must
        be None for factorizers without a density, such as "double_binary".
    budget : float or Budget, optional
        Maximum total cost of the selected layers, including kept ones: bytes of values and
        positions in files, or a share of the dense bytes if at most 1. Use :class:`Budget` to bound
        FLOPs or measured time, or to try values of fewer bits. Each method is first tried on each
        layer at several densities or bits, so that sensitive layers get more.
    layers : str, collection of str or callable, optional
        A regular expression to search in layer names, the names themselves, or a function of name
        and module. By default all linear layers and 1-D to 3-D convolutions.
    overrides : mapping of str to object, optional
        Another method or density, a pair of both, a triple of both and bits, or None to keep the
        layer. Bits are those of the method, if it has any, else of the quantized values. Keys are
        layer names or regular expressions; names come first, then the first expression that
        matches.
    keep : sequence of {"first", "last"}, default=()
        Keep the first or the last of the selected layers.
    calibration : iterable or Calibration, optional
        Batches of inputs, see :class:`Calibration`. Errors of layer outputs are then reduced and
        reported.
    n_jobs : int, default=1
        Number of layers fitted in parallel with joblib; −1 for all cores. Sequential calibration
        fits one layer after the other.
    inplace : bool, default=False
        Whether to change `model` instead of a copy. After an error, `model` is restored: old layers
        are kept until the end, with an `offload_folder` in files.
    dry_run : bool, default=False
        Whether to only report which layers would be compressed, and how. With a budget, trial fits
        are still run.
    progress : bool or callable, default=False
        Whether to show a bar with the layer, the time left and the error so far, in a terminal (on
        standard error) or a notebook; or a function, called with each finished row of the report
        and the number of layers.
    **options
        ``value_bits``, from 2 to 8, quantizes the values of all factors, see
        :class:`matfact.Quantized`; it does not apply to methods with bits of their own in
        `overrides`. All others are fields of :class:`Calibration`, such as ``feedback=False``, if
        `calibration` is a plain iterable.

    Returns
    -------
    model : torch.nn.Module
        The compressed network, with the training modes, hooks and frozen parameters of the
        original. If `model` is a single layer, it is wrapped in a Sequential as "0".
    report : CompressionReport
        One row for each selected layer.

    Raises
    ------
    ValueError
        If a parameter is invalid or matches no layer, if no layer is selected, if a weight to
        compress is not in memory, or if the method fails on a layer; the message names the layer.
        If only the weight is complex and the method is for real ones, or the density is too small
        for its shape, the layer is kept with a warning.

    Examples
    --------
    >>> from matfact.torch import compress
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> model = Sequential(Linear(64, 64), ReLU(), Linear(64, 8))
    >>> small, report = compress(model, "magnitude", density=0.25, keep=("last",))
    >>> small[0].to_product().nnz, [row.status for row in report]
    (1024, ['compressed', 'kept'])
    """
    bar = Bar(progress)
    value_bits = options.pop("value_bits", None)
    given = Calibration.of(calibration, options)
    if given is not None and budget is not None:
        given = dataclasses.replace(given, batches=list(given.batches))  # used twice
    _check(budget, density, keep, value_bits)
    is_layer = is_linear(model)
    if is_layer and inplace and not dry_run:
        raise ValueError(
            f"inplace must be False if the network is a single layer, here a "
            f"{type(model).__name__}: it cannot be replaced in itself."
        )
    original = model
    if not (inplace or dry_run):
        model = copied(model)
    elif inplace:
        check_trainable(model)
    if is_layer:
        model = nn.Sequential(model)  # so that it can be replaced
    metadata: dict[str, Any] = {"method": str(method), "density": density, "steps": []}
    if value_bits is not None:
        metadata["value_bits"] = value_bits
    metadata["untouched"] = other_matrices(model)
    if budget is not None:
        overrides, metadata["budget"] = _shared_out(
            model, method, budget, layers=layers, overrides=overrides or {}, keep=keep,
            calibration=given and given.batches, n_jobs=n_jobs, bar=bar,
        )  # fmt: skip
        method = next(iter(named_methods(method).values()))
    tasks = plan(model, cast(Method, method), density, layers, overrides or {}, keep, value_bits)
    todo = [task for task in tasks if task.factorizer is not None]
    rows = {task.names[0]: task.report("kept" if task.factorizer is None else "planned")
            for task in tasks}  # fmt: skip
    if dry_run:
        return Compressed(original, CompressionReport(rows.values(), metadata))
    _warn_of_none(tasks)
    folder = None if given is None else given.folder
    undo = undone_on_error(model, folder) if inplace else contextlib.nullcontext()
    matched: list[Matched] = []
    with bar, undo as replaced:
        work = {task.names[0]: task.work(given is not None) for task in todo}
        bar.expect(work.values(), len(todo), "" if given is None else "calibration")
        fits = _fits(model, todo, given, n_jobs, matched.append)
        for row in _finished(model, todo, fits, replaced, bar, work):
            rows[row.layer] = row
        if given is not None:
            metadata["steps"].append(given.step)
            if given.match_blocks:
                metadata["blocks"] = [dataclasses.asdict(each) for each in matched]
                metadata["steps"].append(summary(matched))
            if given.reestimate_batchnorm:
                n_layers = reestimate_batch_norm(model, given.batches)
                metadata["steps"].append(f"batch-norm statistics of {n_layers} layers re-estimated")
    model = model.get_submodule("0") if is_layer else model
    return Compressed(attached(model), CompressionReport(rows.values(), metadata))


def _check(budget: Any, density: Any, keep: Any, value_bits: Any) -> None:
    """Raise ``ValueError`` if a parameter is invalid."""
    if budget is not None and density is not None:
        raise ValueError(f"density must be None with a budget, got {density}.")
    if budget is not None and value_bits is not None:
        raise ValueError(
            f"value_bits must be None with a budget, got {value_bits}: give those to try to Budget."
        )
    if isinstance(keep, str) or not {*keep} <= {*get_args(Position)}:
        raise ValueError(f"keep must hold names among {get_args(Position)}, got {keep!r}.")


def _warn_of_none(tasks: list[Task]) -> None:
    """Warn if no selected layer can be compressed."""
    if all(task.view is None for task in tasks):
        first = tasks[0]
        message = f"no selected layer can be compressed; {first.names[0]} is kept: {first.message}."
        warnings.warn(message, CompressionWarning, stacklevel=4)


def _finished(
    model: nn.Module,
    tasks: list[Task],
    fits: _Results,
    replaced: Replaced | None,
    bar: Bar,
    work: Mapping[str, tuple[str, float]],
) -> list[LayerReport]:
    """Replace the layers of all tasks and return the rows of the report."""
    modes = {name: model.get_submodule(name).training for task in tasks for name in task.names[:1]}
    rows = []
    # Closed even if telling fails, so that no batch is left waiting in the network.
    with contextlib.closing(_installed(model, fits, replaced)) as done:
        for row in done:
            rows.append(row)
            _log.info("%s: %s, %d layers in all", row.layer, row.status, len(tasks))
            step = Step(row.layer, *work[row.layer], row.seconds or 0.0, row.error, row.entries)
            bar.advance(step, row, len(tasks))
    for name, training in modes.items():
        model.get_submodule(name).train(training)
    return rows


def _fits(
    model: nn.Module,
    tasks: list[Task],
    calibration: Calibration | None,
    n_jobs: int,
    matched: Callable[[Matched], None],
) -> _Results:
    """Yield each task with its fit, or None if the method cannot handle the layer."""
    fit: _Fit = _try
    statistics: Mapping[str, LayerStatistics] = {}
    if calibration is not None:
        fit = functools.partial(_try, adapt=calibration.adapt, shift_bias=calibration.shift_bias)
        if calibration.sequential:
            yield from _sequential_fits(model, tasks, fit, calibration, matched)
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
    model: nn.Module,
    tasks: list[Task],
    fit: _Fit,
    calibration: Calibration,
    matched: Callable[[Matched], None],
) -> _Results:
    by_name = {task.names[0]: task for task in tasks}
    real = [name for name, task in by_name.items() if _is_real(task)]
    batches, paired = calibration.batches, calibration.feedback
    stops = sequential_statistics(
        model, real, batches, paired=paired, folder=calibration.folder,
        matched=matched if calibration.match_blocks else None,
    )  # fmt: skip
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
) -> tuple[Fitted | None, str]:
    """Return the fit of the layer `name`, or None and the reason."""
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
    """Replace dense layers by factorized ones as fits arrive, and report."""
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
            # With the old layer, and everything the new one holds by now.
            task.view = None
            del fitted
            yield row


def _shared_out(
    model: nn.Module, method: Method | Sequence[Method], budget: float | Budget, **options: Any
) -> tuple[dict[str, Override], dict[str, Any]]:
    """Return overrides that keep the budget, and its entry in the report."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    with options["bar"]:
        allocation, chosen = within_budget(model, budget, named_methods(method), **options)
    facts = {"cost": budget.cost, "ceiling": allocation.budget, "planned": allocation.cost}
    if budget.cost == "seconds":  # then the amount is a share
        facts["dense"] = allocation.budget / budget.amount
    return {**options["overrides"], **chosen}, facts
