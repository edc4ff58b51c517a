"""Give a trained network factors in place of its weight matrices."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, get_args

from joblib import Parallel, delayed
from torch import nn

from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.torch._fit import Adaptation, Fitted, fit_layer
from matfact.torch._matrices import LayerStatistics, replace
from matfact.torch._plan import Layers, Method, Override, Task, plan
from matfact.torch._walk import walk
from matfact.torch.batchnorm import reestimate_batch_norm
from matfact.torch.capture import input_statistics
from matfact.torch.report import CompressionReport, LayerReport

_Fit = Callable[..., tuple[Fitted | None, str]]
_Results = Generator[tuple[Task, Fitted | None]]


class Compressed(NamedTuple):
    """A compressed network and what was done to it."""

    model: nn.Module
    report: CompressionReport


def compress(
    model: nn.Module,
    method: Method = "dsf",
    *,
    density: float | None = None,
    layers: Layers | None = None,
    overrides: Mapping[str, Override] | None = None,
    keep_first: bool = False,
    keep_last: bool = False,
    calibration: Iterable[Any] | None = None,
    sequential: bool = True,
    adapt: Adaptation = "finalize",
    feedback: bool = True,
    shift_bias: bool = True,
    reestimate_batchnorm: bool = False,
    n_jobs: int = 1,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Callable[[LayerReport, int], None] | None = None,
) -> Compressed:
    """Factorize the linear layers and convolutions of a trained network.

    Works on any :class:`torch.nn.Module`: layers are found by their class, replaced by name, and
    their inputs are seen through hooks while the network's own code runs.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    method : str or BaseFactorizer, default="dsf"
        A factorizer, or the name of one: those of ``matfact.compare.METHODS``, "wanda" or "admm".
    density : float, optional
        Stored values ÷ entries of each layer, in (0, 1]. By default what the factorizer says.
    layers : str, collection of str or callable, optional
        A regular expression searched in layer names, the names themselves, or a function of name
        and module. By default all linear layers and 1-D and 2-D convolutions.
    overrides : mapping of str to object, optional
        For layers of that name, or else the first regular expression found in their name: another
        method, another density, a pair of both, or None to keep the layer.
    keep_first, keep_last : bool, default=False
        Keep the first or the last of the selected layers.
    calibration : iterable, optional
        Batches of inputs: tensors, tuples (labels behind the inputs are ignored) or mappings.
        With them the errors of layer outputs are lowered and reported.
    sequential : bool, default=True
        Whether each layer is calibrated on what the layers before it, already compressed, make of
        the batches, with one Gram matrix in memory at a time. Otherwise all layers are calibrated
        in one pass of the dense network, with a Gram matrix for each.
    adapt : {"finalize", "finalize_one", "scale", "none"}, default="finalize"
        What makes factorizers that cannot use calibration inputs themselves take them into
        account: columns of the weight are scaled by what enters them, and after the fit the
        values of all factors, or of the one on the output side, are refitted to the inputs (paper
        001, Section 4.3). "scale" refits nothing, and "none" only reports the error of outputs.
    feedback : bool, default=True
        Whether, with sequential calibration, each layer also makes up for what the layers before
        it have changed: what is factorized is the matrix whose outputs come nearest to those the
        layer has in the dense network. A second pass of each batch runs through that.
    shift_bias : bool, default=True
        Whether, with calibration, the bias of a layer that has one makes up for the mean of what
        its outputs lose.
    reestimate_batchnorm : bool, default=False
        Whether the statistics of batch normalizations are averaged anew over the calibration
        batches at the end, which must be a collection that can be iterated twice. A repair that
        counts as a training step in comparisons, so that the report names it.
    n_jobs : int, default=1
        Layers fitted at a time, by joblib; −1 for one on each core. Sequential calibration fits
        one after the other.
    inplace : bool, default=False
        Whether `model` itself is changed; otherwise it stays as it is and a copy is returned.
    dry_run : bool, default=False
        Whether to report only which layers would be compressed, and how.
    progress : callable, optional
        Called with each finished row of the report and the number of layers.

    Returns
    -------
    model : torch.nn.Module
        The compressed network, with the training modes of the old.
    report : CompressionReport
        One row for each selected layer.

    Raises
    ------
    ValueError
        If a parameter is invalid or no layer is selected. A layer that the method cannot take, as
        where the density is too small for its shape, is kept with a warning instead.

    Examples
    --------
    >>> from matfact.torch import compress
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> model = Sequential(Linear(64, 64), ReLU(), Linear(64, 8))
    >>> small, report = compress(model, "magnitude", density=0.25, keep_last=True)
    >>> small[0].to_product().nnz, [row.status for row in report]
    (1024, ['compressed', 'kept'])
    """
    if reestimate_batchnorm and calibration is None:
        raise ValueError("reestimate_batchnorm needs calibration batches, got calibration=None.")
    if adapt not in get_args(Adaptation):
        raise ValueError(f"adapt must be one of {get_args(Adaptation)}, got {adapt!r}.")
    if not (inplace or dry_run):
        model = copy.deepcopy(model)
    tasks = plan(model, method, density, layers, overrides or {}, (keep_first, keep_last))
    todo = [task for task in tasks if task.factorizer is not None]
    rows = {task.names[0]: task.report("kept" if task.factorizer is None else "planned")
            for task in tasks}  # fmt: skip
    metadata: dict[str, Any] = {"method": str(method), "density": density, "steps": []}
    if dry_run:
        return Compressed(model, CompressionReport(rows.values(), metadata))
    fit = functools.partial(_try, adapt=adapt, shift_bias=shift_bias)
    modes = {task.names[0]: task.view.layer.training for task in todo}
    form = (sequential, feedback)
    with contextlib.closing(_fits(model, todo, fit, calibration, form, n_jobs)) as fits:
        for task, fitted in fits:
            row = _install(model, task, fitted)
            rows[row.layer] = row
            if progress is not None:
                progress(row, len(todo))
    for name, training in modes.items():
        model.get_submodule(name).train(training)
    if calibration is not None:
        metadata["steps"].append(_calibration_step(sequential, adapt, feedback, shift_bias))
    if reestimate_batchnorm:
        n_layers = reestimate_batch_norm(model, calibration or ())
        metadata["steps"].append(f"batch-norm statistics of {n_layers} layers re-estimated")
    return Compressed(model, CompressionReport(rows.values(), metadata))


def _calibration_step(sequential: bool, adapt: Adaptation, feedback: bool, shift_bias: bool) -> str:
    said: list[str] = [adapt]
    said += ["feedback"] if sequential and feedback else []
    said += ["shifted biases"] if shift_bias else []
    return f"{'sequential ' if sequential else ''}calibration ({', '.join(said)})"


def _fits(
    model: nn.Module,
    tasks: list[Task],
    fit: _Fit,
    calibration: Iterable[Any] | None,
    form: tuple[bool, bool],
    n_jobs: int,
) -> _Results:
    """Yield each task with its fit; None where the method cannot take the layer."""
    sequential, feedback = form
    if calibration is not None and sequential:
        yield from _sequential_fits(model, tasks, fit, calibration, feedback)
        return
    statistics: Mapping[str, Any] = {}
    if calibration is not None:
        statistics = input_statistics(model, calibration, [task.names[0] for task in tasks])
        _note_unreached(tasks, statistics)
    run = Parallel(n_jobs=n_jobs, return_as="generator")
    jobs = (delayed(fit)(*task.problem(), statistics.get(task.names[0])) for task in tasks)
    for task, (fitted, problem) in zip(tasks, run(jobs), strict=True):
        task.message = problem or task.message
        yield task, fitted


def _sequential_fits(
    model: nn.Module, tasks: list[Task], fit: _Fit, calibration: Iterable[Any], feedback: bool
) -> _Results:
    by_name = {task.names[0]: task for task in tasks}
    reached = set()
    with contextlib.closing(walk(model, list(by_name), calibration, paired=feedback)) as stops:
        for name, statistics in stops:
            task = by_name[name]
            reached.add(name)
            fitted, problem = fit(*task.problem(), statistics)
            task.message = problem or task.message
            yield task, fitted
    _note_unreached(tasks, reached)
    for task in tasks:
        if task.names[0] not in reached:
            fitted, problem = fit(*task.problem(), None)
            task.message = problem or task.message
            yield task, fitted


def _note_unreached(tasks: list[Task], reached: Any) -> None:
    """Say of layers that no calibration batch has called that they are fitted without."""
    for task in tasks:
        if task.names[0] not in reached:
            task.message = "no calibration batch called it: fitted without"
            warnings.warn(f"{task.names[0]}: {task.message}.", stacklevel=4)


def _try(
    factorizer: BaseFactorizer,
    matrices: list[Array],
    has_bias: bool,
    statistics: LayerStatistics | None,
    *,
    adapt: Adaptation,
    shift_bias: bool,
) -> tuple[Fitted | None, str]:
    """Return the fit, or why the method cannot take the layer."""
    try:
        return fit_layer(factorizer, matrices, statistics, adapt, shift=shift_bias and has_bias), ""
    except ValueError as error:
        return None, f"kept: {error}"


def _install(model: nn.Module, task: Task, fitted: Fitted | None) -> LayerReport:
    """Put the factorized layer in place of the dense one, and report."""
    if fitted is None:
        warnings.warn(f"{task.names[0]}: {task.message}", stacklevel=4)
        return task.report("kept")
    replace(model, task.names, task.view, fitted.products, fitted.shifts)
    return task.report("compressed", fitted)
