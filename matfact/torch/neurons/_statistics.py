"""Statistics of a consumer's inputs in the pruned network and outputs in the dense one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from matfact.calibration import OutputStatistics
from matfact.torch.calibration.statistics import layer_input, rows_of
from matfact.torch.layers._matricized import as_array, matricized
from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._trial import channel_axis, removed
from matfact.torch.running._batches import as_written, checked, eval_mode, forward
from matfact.torch.running._random import batch_states, drawing


def paired_statistics(
    model: nn.Module, dense: nn.Module, block: NeuronBlock, batches: Iterable[Any]
) -> OutputStatistics:
    """Return moments of the consumer's inputs in `model` and outputs in `dense`, without bias.

    All of its calls count. If a call has no counterpart in the dense network, for example because
    other tokens are routed to an expert, the consumer's outputs for its own inputs are the target.

    Parameters
    ----------
    model, dense : torch.nn.Module
        The current network, with the original weight of the consumer, and the dense network.
    block : NeuronBlock
        Block with the consumer.
    batches : iterable
        Inputs of both networks; they use the same random numbers.
    """
    view = matricized(model.get_submodule(block.consumer))
    assert view is not None
    statistics = OutputStatistics()
    written: list[Tensor] = []  # by the dense network, for the current batch
    index, batch = 0, None

    def counted(x: Tensor) -> Tensor:
        return rows_of(view, x, batch, model)

    def write(layer: Any, args: Any, output: Tensor) -> None:
        written.append(_without_bias(layer, counted(output)))

    def read(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        own = _without_bias(layer, counted(output))
        dense_rows = written.pop(0) if written else None
        rows = dense_rows if dense_rows is not None and _are_pairs(own, dense_rows) else own
        x = counted(layer_input(args, kwargs))
        if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(rows).all())):
            raise ValueError(
                f"batches must give finite inputs and outputs of layers, but batch {index} does "
                f"not at {block.consumer!r}."
            )
        for (piece,) in view._inputs(x) if x.numel() else ():
            statistics.update(as_array(piece), as_array(rows[: len(piece)]))
            rows = rows[len(piece) :]

    handles = [
        dense.get_submodule(block.consumer).register_forward_hook(write),
        model.get_submodule(block.consumer).register_forward_hook(read, with_kwargs=True),
    ]
    states = batch_states(model, dense)
    with removed(handles), eval_mode(model), eval_mode(dense), torch.no_grad():
        for batch in checked(batches):
            state = next(states)
            for network in (dense, model):
                with drawing(state), as_written():
                    forward(network, batch)
            written.clear()
            index += 1
    return statistics


def _without_bias(layer: Any, output: Tensor) -> Tensor:
    """Return outputs as rows, copied since later code may modify them."""
    rows = output.movedim(channel_axis(layer), -1)
    rows = rows.clone() if layer.bias is None else rows - layer.bias
    return rows.reshape(-1, rows.shape[-1])


def _are_pairs(own: Tensor, dense: Tensor) -> bool:
    """Whether rows belong to the same inputs: closer to each other than to their mean."""
    if own.shape != dense.shape:
        return False
    difference = own.double() - dense.double()
    spread = dense.double()
    if len(own) > 1:
        difference, spread = difference - difference.mean(0), spread - spread.mean(0)
    return float(difference.norm()) <= float(spread.norm())
