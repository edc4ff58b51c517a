"""Pruning of the hidden units of a network, block by block."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from matfact import backend, metrics
from matfact._progress import Bar, Step
from matfact.calibration import OutputStatistics
from matfact.solvers import cosamp
from matfact.solvers.quadratic import Selection, quadratic
from matfact.torch._attached import attached
from matfact.torch._warnings import CompressionWarning
from matfact.torch.layers._matricized import as_array
from matfact.torch.layers._narrowed import remember
from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._check import objection
from matfact.torch.neurons._cut import cut_units, modules_of, way_back, weight_on
from matfact.torch.neurons._find import find_blocks
from matfact.torch.neurons._statistics import paired_statistics
from matfact.torch.neurons._trial import Trial
from matfact.torch.running._batches import check_collection, device_of, eval_mode
from matfact.torch.running._offloaded import refuse_offloaded
from matfact.torch.running._random import RandomState, drawing, generators_of
from matfact.torch.running._tensors import check_trainable, first_filled, outside_inference_mode

Method = Literal["least_squares", "gradient", "ispasp"]

_SOLVERS: dict[str, Any] = {
    "least_squares": cosamp.least_squares,
    "gradient": cosamp.gradient,
    "ispasp": cosamp.ispasp,
}


@dataclasses.dataclass(frozen=True)
class PrunedBlock:
    """Result of pruning a block.

    Attributes
    ----------
    block : NeuronBlock
        The block before pruning.
    kept : ndarray of int
        Kept units.
    error : float
        Relative error of the consumer's outputs on the calibration batches, compared with the dense
        network. NaN if no batch reached the consumer or its outputs were all zero; all units are
        then kept.
    """

    block: NeuronBlock
    kept: np.ndarray
    error: float


@dataclasses.dataclass(frozen=True)
class NeuronPruning:
    """A network with pruned units, and the result for each block.

    Attributes
    ----------
    model : torch.nn.Module
        The network, with smaller layers of the same classes.
    blocks : list of PrunedBlock
        Results in the order of pruning.
    """

    model: nn.Module
    blocks: list[PrunedBlock]


@outside_inference_mode
def prune_neurons(
    model: nn.Module,
    batches: Iterable[Any],
    n_neurons: float | Mapping[str, float] | None = None,
    *,
    max_error: float | None = None,
    blocks: Sequence[NeuronBlock] | None = None,
    method: Method = "least_squares",
    max_iter: int = 50,
    inplace: bool = False,
    progress: bool | Callable[[PrunedBlock], Any] | None = False,
) -> NeuronPruning:
    """Remove hidden units and channels block by block, and refit the layers that read them.

    Each block is fitted on the activations of the already pruned network to the consumer's outputs
    in the dense network, so later blocks correct errors of earlier ones. Activations are streamed;
    memory holds second moments of one block at a time.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    batches : iterable
        Inputs of the network: tensors, tuples or lists (labels after the inputs are ignored) or
        mappings. They are iterated for each block, so generators are not allowed. Each batch uses
        the same random numbers in every pass, and the state of the generators is restored.
    n_neurons : int, float, mapping or None, default=None
        Units to keep in each block: a number, or a fraction in (0, 1] (rounded down, at least one).
        None keeps half of them, or as few as `max_error` allows. A mapping gives values by the name
        of the consumer; other blocks are not pruned.
    max_error : float or None, default=None
        Upper bound on the ``error`` of each block, in [0, 1), instead of `n_neurons`. Only for
        "least_squares". If errors of earlier blocks make it unreachable, all units are kept.
    blocks : sequence of NeuronBlock, optional
        Blocks to prune, in the order of calls; by default those of `find_blocks`. Given
        blocks are verified in the same way.
    method : {"least_squares", "gradient", "ispasp"}, default="least_squares"
        As in `matfact.CoSaMPNeuronSelector`. "least_squares" also refits biases.
    max_iter : int, default=50
        Maximum number of iterations of the selection.
    inplace : bool, default=False
        Whether to change `model` instead of a copy. It is restored if anything fails.
    progress : bool or callable, default=False
        Whether to show a bar with the block's consumer, the time left and the error so far, in a
        terminal (on standard error) or a notebook; or a function, called with the result of each
        block.

    Returns
    -------
    NeuronPruning
        The pruned network, in ``model``, and the blocks.

    Raises
    ------
    ValueError
        If an argument is invalid, or an input of a layer is not finite. The message names the layer
        and the batch.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch.neurons import prune_neurons
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator ...>
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> prune_neurons(model, [torch.randn(100, 4)], n_neurons=8).model
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    if method not in _SOLVERS:
        raise ValueError(f"method must be one of {', '.join(_SOLVERS)}, got {method!r}.")
    bar = Bar(progress)
    check_collection(batches)
    refuse_offloaded(model)
    if inplace:
        check_trainable(model)
    first = first_filled(batches)
    if blocks is None:
        blocks = find_blocks(model, first)
        if not blocks:
            message = "no block of hidden units can be pruned: the network is not changed."
            warnings.warn(message, CompressionWarning, stacklevel=3)
    else:
        _check_blocks(model, blocks, first)
    if max_error is None:
        counts = _counts(0.5 if n_neurons is None else n_neurons, blocks)
    else:
        _check_target(max_error, n_neurons, method)
        counts = {block.consumer: block.n_units for block in blocks}
    smaller = copy.deepcopy(model)
    model, dense = (model, smaller) if inplace else (smaller, model)
    chosen = [block for block in blocks if block.consumer in counts]
    restore = way_back({m for block in chosen for m in modules_of(model, block)})
    pruned: list[PrunedBlock] = []
    state = RandomState.now(device_of(model), generators_of(model, dense))
    # FLOPs for one input: two networks run, and second moments of the units are taken.
    run = 4 * sum(parameter.numel() for parameter in model.parameters())
    work = {block.consumer: float(run + 2 * block.n_units**2) for block in chosen}
    try:
        bar.expect([("", amount) for amount in work.values()], len(chosen))
        for block in chosen:
            with drawing(state):
                statistics = paired_statistics(model, dense, block, batches)
            count = counts[block.consumer]
            pruned.append(_prune(model, block, statistics, count, max_error, method, max_iter))
            step = Step(block.consumer, work=work[block.consumer], error=pruned[-1].error)
            bar.advance(step, pruned[-1])
    except BaseException:
        restore()
        raise
    finally:
        bar.close()
    remember(model, dense)
    return NeuronPruning(attached(model), pruned)


def _prune(
    model: nn.Module,
    block: NeuronBlock,
    statistics: OutputStatistics,
    count: int,
    max_error: float | None,
    method: Method,
    max_iter: int,
) -> PrunedBlock:
    """Prune one block, if batches reached it."""
    if not (statistics.inputs.count and statistics.energy):
        return PrunedBlock(block, np.arange(block.n_units), np.nan)
    with_bias = method == "least_squares" and _bias(model, block) is not None
    fitted = statistics.centered() if with_bias else statistics
    selection = _select(fitted, block, count, max_error, method, max_iter)
    if method == "least_squares":
        selection = _completed(model, block, fitted, selection)
    _shrink(model, block, statistics, selection, with_bias)
    return PrunedBlock(block, selection.support, selection.error**0.5)


def _check_blocks(model: nn.Module, blocks: Sequence[NeuronBlock], batch: Any) -> None:
    """Raise ``ValueError`` for invalid blocks."""
    names = {name for name, _ in model.named_modules()}
    with eval_mode(model), torch.no_grad():
        for block in blocks:
            reason = (
                "it names modules that are not there"
                if not names.issuperset([*block.producers, *block.between, block.consumer])
                else objection(Trial(model, batch), block)
            )
            if reason:
                raise ValueError(f"blocks must be blocks of the network, got {block}: {reason}.")


def _bias(model: nn.Module, block: NeuronBlock) -> Any:
    """Return the bias of a block's consumer, or None."""
    return getattr(model.get_submodule(block.consumer), "bias", None)


def _counts(
    n_neurons: float | Mapping[str, float], blocks: Sequence[NeuronBlock]
) -> dict[str, int]:
    """Return the number of units to keep, by the name of the consumer."""
    units = {block.consumer: block.n_units for block in blocks}
    wanted = n_neurons if isinstance(n_neurons, Mapping) else dict.fromkeys(units, n_neurons)
    if unknown := sorted(set(wanted) - set(units)):
        raise ValueError(
            f"n_neurons must name consumers among {sorted(units)}, got {', '.join(unknown)}."
        )
    counts = {}
    for name, value in wanted.items():
        whole = isinstance(value, Integral)
        if not (1 <= value <= units[name] if whole else 0.0 < value <= 1.0):
            raise ValueError(
                f"n_neurons must be from 1 to the {units[name]} units that {name!r} reads, or a "
                f"fraction in (0, 1], got {value}."
            )
        counts[name] = int(value) if whole else max(1, metrics.part_of(units[name], value))
    return counts


def _check_target(max_error: float, n_neurons: Any, method: Method) -> None:
    """Raise ``ValueError`` if `max_error` is invalid or conflicts with other parameters."""
    if not 0.0 <= max_error < 1.0:
        raise ValueError(f"max_error must lie in [0, 1), got {max_error}.")
    if n_neurons is not None:
        raise ValueError(f"n_neurons must be None with max_error, got {n_neurons}.")
    if method != "least_squares":
        raise ValueError(f"method must be 'least_squares' with max_error, got {method!r}.")


def _select(
    statistics: OutputStatistics,
    block: NeuronBlock,
    count: int,
    max_error: float | None,
    method: Method,
    max_iter: int,
) -> Selection:
    """Return `count` units, or as few as `max_error` allows; all if it is unreachable."""
    if max_error is None:
        return _SOLVERS[method](statistics, count, max_iter, width=block.width)
    try:
        return cosamp.smallest_selection(statistics, max_error**2, max_iter, width=block.width)
    except ValueError:  # even all units exceed the error
        return cosamp.least_squares(statistics, count, max_iter, width=block.width)


def _completed(
    model: nn.Module, block: NeuronBlock, statistics: OutputStatistics, selection: Selection
) -> Selection:
    """Return a selection with the weights of `model` in directions without inputs.

    A few samples leave directions without inputs, in which other samples may have some.
    """
    problem, norms = quadratic(statistics, block.width).normalized()
    columns = problem.columns(selection.support)
    present = as_array(weight_on(model, block, torch.from_numpy(selection.support)).double())
    xp = backend.namespace(norms)
    norms = xp.take(norms, backend.like(columns, norms), axis=0)[:, None]
    missing = problem.unseen(selection.support, xp.matrix_transpose(present) * norms)
    return dataclasses.replace(selection, weights=selection.weights + missing / norms)


def _shrink(
    model: nn.Module,
    block: NeuronBlock,
    statistics: OutputStatistics,
    selection: Selection,
    with_bias: bool,
) -> None:
    """Reduce a block to the units of a selection."""
    support, weight = selection.support, backend.to_numpy(selection.weights).T
    bias: Tensor | None = None
    if with_bias:
        means = backend.to_numpy(statistics.inputs.mean).reshape(block.n_units, block.width)
        shift = backend.to_numpy(statistics.mean) - weight @ means[support].reshape(-1)
        present = _bias(model, block)
        bias = present.detach() + torch.from_numpy(shift).to(present)
    cut_units(model, block, torch.from_numpy(support), torch.from_numpy(weight), bias)
