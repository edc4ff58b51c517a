"""Fewer hidden units in many blocks of a network, one after the other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from matfact import backend, metrics
from matfact.calibration import OutputStatistics
from matfact.solvers import cosamp
from matfact.solvers.quadratic import Selection
from matfact.torch._batches import checked, eval_mode, forward
from matfact.torch._matrices import as_array, matricized
from matfact.torch._narrowed import remember
from matfact.torch.capture import layer_input
from matfact.torch.neurons._blocks import NeuronBlock, channel_axis, cut_units, find_blocks, removed

Method = Literal["least_squares", "gradient", "ispasp"]

_SOLVERS: dict[str, Any] = {
    "least_squares": cosamp.least_squares,
    "gradient": cosamp.gradient,
    "ispasp": cosamp.ispasp,
}


@dataclasses.dataclass(frozen=True)
class PrunedBlock:
    """What has become of the units of a block.

    Attributes
    ----------
    block : NeuronBlock
        The units before.
    kept : ndarray of int
        Which of them are left.
    error : float
        Relative error of the consumer's outputs on the calibration batches, against those of the
        dense network.
    """

    block: NeuronBlock
    kept: np.ndarray
    error: float


@dataclasses.dataclass(frozen=True)
class NeuronPruning:
    """The smaller network, and what was removed.

    Attributes
    ----------
    model : torch.nn.Module
        The network, whose layers are of the classes they were, only smaller.
    blocks : list of PrunedBlock
        In the order in which they were pruned.
    """

    model: nn.Module
    blocks: list[PrunedBlock]


def prune_neurons(
    model: nn.Module,
    batches: Sequence[Any],
    n_neurons: float | Mapping[str, float] | None = None,
    *,
    max_error: float | None = None,
    blocks: Sequence[NeuronBlock] | None = None,
    method: Method = "least_squares",
    max_iter: int = 50,
    inplace: bool = False,
    progress: Callable[[PrunedBlock], Any] | None = None,
) -> NeuronPruning:
    """Remove hidden units and channels, block by block, and re-solve the layers that read them.

    Each block sees the activations that the blocks pruned before it leave, and is fitted to what
    its consumer made of those of the dense network, so that later blocks make up for earlier
    ones. Activations are streamed: moments are kept, of one block at a time.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    batches : sequence
        What the network is called with: tensors, tuples (labels behind the inputs are ignored) or
        mappings. Iterated over once for each block.
    n_neurons : int, float, mapping or None, default=None
        Units to keep in each block: a number, a fraction in (0, 1] (rounded down, at least one),
        or None for half of them, or for as few as `max_error` allows. A mapping gives it by the
        name of the consumer; other blocks are left alone.
    max_error : float or None, default=None
        Largest ``error`` wanted of each block, in [0, 1), in place of `n_neurons` and for
        ``"least_squares"`` alone. Where earlier blocks have lost more than later ones can make
        up for, all units stay.
    blocks : sequence of NeuronBlock, optional
        What to prune, in the order of calls; by default all that :func:`find_blocks` finds.
    method : {"least_squares", "gradient", "ispasp"}, default="least_squares"
        As for :class:`~matfact.CoSaMPNeuronSelector`. The first also re-solves biases.
    max_iter : int, default=50
        Most iterations of the selection.
    inplace : bool, default=False
        Whether `model` itself shrinks, or a copy.
    progress : callable, optional
        Called with what has become of each block.

    Returns
    -------
    NeuronPruning
        The smaller network, in ``model``, and the blocks.

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
    if not len(batches):
        raise ValueError("batches must hold at least one batch, got none.")
    if blocks is None:
        blocks = find_blocks(model, batches[0])
    if max_error is None:
        counts = _counts(0.5 if n_neurons is None else n_neurons, blocks)
    else:
        _check_target(max_error, n_neurons, method)
        counts = {block.consumer: block.n_units for block in blocks}
    dense = copy.deepcopy(model)
    model = model if inplace else copy.deepcopy(model)
    pruned: list[PrunedBlock] = []
    for block in blocks:
        if block.consumer not in counts:
            continue
        statistics = _statistics(model, dense, block, batches)
        with_bias = method == "least_squares" and _bias(model, block) is not None
        fitted = statistics.centered() if with_bias else statistics
        selection = _select(fitted, block, counts[block.consumer], max_error, method, max_iter)
        _shrink(model, block, statistics, selection, with_bias)
        pruned.append(PrunedBlock(block, selection.support, selection.error**0.5))
        if progress is not None:
            progress(pruned[-1])
    remember(model, dense)
    return NeuronPruning(model, pruned)


def _counts(
    n_neurons: float | Mapping[str, float], blocks: Sequence[NeuronBlock]
) -> dict[str, int]:
    """Return how many units to keep, by the names of consumers."""
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
    """Raise ``ValueError`` if `max_error` is no error, or goes with no other parameter."""
    if not 0.0 <= max_error < 1.0:
        raise ValueError(f"max_error must lie in [0, 1), got {max_error}.")
    if n_neurons is not None:
        raise ValueError(f"n_neurons must be None with max_error, got {n_neurons}.")
    if method != "least_squares":
        raise ValueError(f"method must be 'least_squares' with max_error, got {method!r}.")


def _statistics(
    model: nn.Module, dense: nn.Module, block: NeuronBlock, batches: Iterable[Any]
) -> OutputStatistics:
    """Return moments of what the consumer reads in `model` and writes in `dense`, sans bias."""
    view = matricized(model.get_submodule(block.consumer))
    original: Any = dense.get_submodule(block.consumer)
    assert view is not None
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def read(layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(layer_input(args, kwargs))

    def write(layer: nn.Module, args: Any, output: Tensor) -> None:
        output = output.movedim(channel_axis(layer, output), -1)
        output = output if original.bias is None else output - original.bias
        outputs.append(output.reshape(-1, output.shape[-1]))

    handles = [
        view.layer.register_forward_pre_hook(read, with_kwargs=True),
        original.register_forward_hook(write),
    ]
    statistics = OutputStatistics()
    with removed(handles), eval_mode(model), eval_mode(dense), torch.no_grad():
        for batch in checked(batches):
            forward(model, batch)
            forward(dense, batch)
            while inputs:
                rows = outputs.pop()
                for (piece,) in view._inputs(inputs.pop()):
                    statistics.update(as_array(piece), as_array(rows[: len(piece)]))
                    rows = rows[len(piece) :]
    return statistics


def _select(
    statistics: OutputStatistics,
    block: NeuronBlock,
    count: int,
    max_error: float | None,
    method: Method,
    max_iter: int,
) -> Selection:
    """Return `count` units, or as few as `max_error` allows; all where they miss it themselves."""
    if max_error is None:
        return _SOLVERS[method](statistics, count, max_iter, width=block.width)
    try:
        return cosamp.smallest_selection(statistics, max_error**2, max_iter, width=block.width)
    except ValueError:
        return cosamp.least_squares(statistics, count, max_iter, width=block.width)


def _bias(model: nn.Module, block: NeuronBlock) -> Any:
    """Return the bias of the consumer of a block, None if it has none."""
    return getattr(model.get_submodule(block.consumer), "bias", None)


def _shrink(
    model: nn.Module,
    block: NeuronBlock,
    statistics: OutputStatistics,
    selection: Selection,
    with_bias: bool,
) -> None:
    """Cut a block to the units of a selection."""
    support, weight = selection.support, backend.to_numpy(selection.weights).T
    if with_bias:
        means = backend.to_numpy(statistics.inputs.mean).reshape(block.n_units, block.width)
        shift = backend.to_numpy(statistics.mean) - weight @ means[support].reshape(-1)
        bias = _bias(model, block)
        with torch.no_grad():
            bias += torch.from_numpy(shift).to(bias)
    cut_units(model, block, torch.from_numpy(support), torch.from_numpy(weight))
