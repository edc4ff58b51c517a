"""Compression of a trained network."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast, get_args

from torch import nn

from matfact._progress import Bar, Step
from matfact.report import CompressionReport, LayerReport
from matfact.torch._attached import attached
from matfact.torch._warnings import CompressionWarning
from matfact.torch.calibration._match import Matched, summary
from matfact.torch.calibration.batchnorm import reestimate_batch_norm
from matfact.torch.calibration.options import Calibration, CalibrationOptions
from matfact.torch.compression._fits import Results, fits
from matfact.torch.compression._resume import resuming, settings
from matfact.torch.compression._tasks import Layers, Method, Override, Position, Task, plan
from matfact.torch.compression._undo import Replaced, undone_on_error
from matfact.torch.compression.budget import Budget, named_methods, within_budget
from matfact.torch.layers._inherit import copied
from matfact.torch.layers._matricized import is_linear, other_matrices, replace
from matfact.torch.running._batches import checked
from matfact.torch.running._tensors import check_trainable, outside_inference_mode

#: Re-exported names.
__all__ = ["Compressed", "CompressionReport", "LayerReport", "compress"]

_log = logging.getLogger(__name__)


class CompressOptions(CalibrationOptions, total=False):
    """Further keywords of `compress`."""

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
    resume_folder: str | Path | None = None,
    progress: bool | Callable[[LayerReport, int], None] | None = False,
    **options: Unpack[CompressOptions],
) -> Compressed:
    """Factorize the linear layers and convolutions of a trained network.

    Works on any `torch.nn.Module`. Layers are found by class and replaced by name; hooks
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
        positions in files, or a share of the dense bytes if at most 1. Use `Budget` to bound
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
        Batches of inputs, see `Calibration`. Errors of layer outputs are then reduced and
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
    resume_folder : str or Path, optional
        A new or empty folder, in which each finished fit, trial and matched block is stored. If the
        process is killed, the same call takes them up and gives the same result, to the bit: passes
        of calibration run again, solvers do not. Its files stay until you delete them, so do that
        once the result is saved. Batches are held in memory.
    progress : bool or callable, default=False
        Whether to show a bar with the layer, the time left and the error so far, in a terminal (on
        standard error) or a notebook; or a function, called with each finished row of the report
        and the number of layers.
    **options
        ``value_bits``, from 2 to 8, quantizes the values of all factors, see
        `matfact.Quantized`; it does not apply to methods with bits of their own in
        `overrides`. All others are fields of `Calibration`, such as ``feedback=False``, if
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
        for its shape, the layer is kept with a warning. If `resume_folder` belongs to a run with
        other weights, batches or options; the message names what differs.

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
    _check(budget, density, keep, value_bits)
    if budget is not None and not isinstance(budget, Budget):
        budget = Budget(budget)
    if given is not None and (budget is not None or resume_folder is not None):  # used twice
        given = dataclasses.replace(given, batches=list(checked(given.batches)))
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
    methods = {"": cast(Method, method)} if budget is None else named_methods(method)
    plans: dict[str, list[Task]] = {}
    for label, each in methods.items():
        plans[label] = plan(model, each, density, layers, overrides or {}, keep, value_bits)
    with resuming(resume_folder, lambda: settings(model, plans, given, budget)) as parts:
        tasks = next(iter(plans.values()))
        plans.clear()  # they hold the dense layers
        if budget is not None:
            overrides, metadata["budget"] = _shared_out(
                model, methods, budget, layers=layers, overrides=overrides or {}, keep=keep,
                calibration=given and given.batches, n_jobs=n_jobs, bar=bar, parts=parts,
            )  # fmt: skip
            tasks = plan(model, next(iter(methods.values())), None, layers, overrides, keep)
        rows = {task.names[0]: task.report("kept" if task.factorizer is None else "planned")
                for task in tasks}  # fmt: skip
        if dry_run:
            return Compressed(original, CompressionReport(rows.values(), metadata))
        _warn_of_none(tasks)
        todo = [task for task in tasks if task.factorizer is not None]
        folder = None if given is None else given.folder
        is_trained = given is not None and given.match_blocks
        undo = undone_on_error(model, folder, is_trained) if inplace else contextlib.nullcontext()
        matched: list[Matched] = []
        with bar, undo as replaced:
            left = [task for task in todo if task.names[0] not in parts.layers]
            work = {task.names[0]: task.work(given is not None) for task in left}
            bar.expect(work.values(), len(todo), "" if given is None else "calibration")
            found = fits(model, todo, given, n_jobs, parts, matched.append)
            for row in _finished(model, todo, found, replaced, bar, work):
                rows[row.layer] = row
            if given is not None:
                _end(model, given, matched, metadata)
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


def _end(
    model: nn.Module, given: Calibration, matched: list[Matched], metadata: dict[str, Any]
) -> None:
    """Note what calibration has done, and re-estimate statistics if it shall."""
    metadata["steps"].append(given.step)
    if given.match_blocks:
        metadata["blocks"] = [dataclasses.asdict(each) for each in matched]
        metadata["steps"].append(summary(matched))
        if all(each.after is None for each in matched):
            why = f" {matched[0].block!r}: {matched[0].note}." if matched else ""
            message = f"match_blocks has trained none of {len(matched)} blocks.{why}"
            warnings.warn(message, CompressionWarning, stacklevel=4)
    if given.reestimate_batchnorm:
        n_layers = reestimate_batch_norm(model, given.batches)
        metadata["steps"].append(f"batch-norm statistics of {n_layers} layers re-estimated")


def _warn_of_none(tasks: list[Task]) -> None:
    """Warn if no selected layer can be compressed."""
    if all(task.view is None for task in tasks):
        first = tasks[0]
        message = f"no selected layer can be compressed; {first.names[0]} is kept: {first.message}."
        warnings.warn(message, CompressionWarning, stacklevel=4)


def _finished(
    model: nn.Module,
    tasks: list[Task],
    found: Results,
    replaced: Replaced | None,
    bar: Bar,
    work: Mapping[str, tuple[str, float]],
) -> list[LayerReport]:
    """Replace the layers of all tasks and return the rows of the report."""
    modes = {name: model.get_submodule(name).training for task in tasks for name in task.names[:1]}
    rows = []
    # Closed even if telling fails, so that no batch is left waiting in the network.
    with contextlib.closing(_installed(model, found, replaced)) as done:
        for row in done:
            rows.append(row)
            _log.info("%s: %s, %d layers in all", row.layer, row.status, len(tasks))
            spent = work.get(row.layer, ("", 0.0))  # none, if an earlier run has fitted it
            step = Step(row.layer, *spent, row.seconds or 0.0, row.error, row.entries)
            bar.advance(step, row, len(tasks))
    for name, training in modes.items():
        model.get_submodule(name).train(training)
    return rows


def _installed(
    model: nn.Module, found: Results, replaced: Replaced | None
) -> Generator[LayerReport]:
    """Replace dense layers by factorized ones as fits arrive, and report."""
    with contextlib.closing(found):
        for task, fitted in found:
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
    model: nn.Module, methods: Mapping[str, Method], budget: Budget, **options: Any
) -> tuple[dict[str, Override], dict[str, Any]]:
    """Return overrides that keep the budget, and its entry in the report."""
    with options["bar"]:
        allocation, chosen = within_budget(model, budget, methods, **options)
    facts = {"cost": budget.cost, "ceiling": allocation.budget, "planned": allocation.cost}
    if budget.cost == "seconds":  # then the amount is a share
        facts["dense"] = allocation.budget / budget.amount
    return {**options["overrides"], **chosen}, facts
