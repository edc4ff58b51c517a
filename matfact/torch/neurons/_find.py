"""Search for blocks of hidden units by tracing the flow of values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._check import is_cuttable, objection, shape_of
from matfact.torch.neurons._trial import Trace, Trial
from matfact.torch.running._batches import eval_mode


def find_blocks(model: nn.Module, batch: Any) -> list[NeuronBlock]:
    """Find all hidden units that can be removed, by tracing values in a forward pass.

    Outputs of a layer are replaced by NaN; the layers that receive NaN read them. Units are found
    if a single layer reads them, at separate positions. They may pass through activations, gates,
    batch normalization, depthwise convolutions and pooling, but residual streams and attention
    heads do not qualify. Each block is then verified: without some units, the network must compute
    the same as with zeros at the layer that reads them. No knowledge of architectures is used.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode. Only layers with torch's own forward are considered.
    batch : tensor, tuple or mapping
        Input of the network; a few samples are enough.

    Returns
    -------
    list of NeuronBlock
        Blocks in the order of calls of their consumers.

    Raises
    ------
    ValueError
        If the outputs of the network contain NaN.
    """
    trial = Trial(model, batch)
    found: dict[tuple[str, int, int], tuple[list[str], list[str]]] = {}
    with eval_mode(model), torch.no_grad():
        order = trial.call_order()
        for name in order:
            match = _match(trial, name)
            if match is not None:
                key, between = match
                producers, modules = found.setdefault(key, ([], []))
                producers.append(name)
                modules.extend(m for m in between if m not in modules)
        blocks = [
            NeuronBlock(tuple(producers), tuple(between), consumer, n_units, width)
            for (consumer, n_units, width), (producers, between) in found.items()
        ]
        blocks = [block for block in blocks if objection(trial, block) is None]
    return sorted(blocks, key=lambda block: order.index(block.consumer))


def _match(trial: Trial, name: str) -> tuple[tuple[str, int, int], list[str]] | None:
    """Return the only reader of a layer's outputs, the number of units and its inputs per unit.

    Also return the modules that units pass through. Return None unless a single layer reads the
    first and the last output, at separate positions.
    """
    if not is_cuttable(trial.model.get_submodule(name)):
        return None
    n_units = shape_of(trial.model.get_submodule(name))[0]
    traces = {unit: trial.follow([name], torch.tensor([unit])) for unit in (0, n_units - 1)}
    first = traces[0]
    if n_units < 2 or len(first.read) != 1 or not _are_own(traces, first):
        return None
    ((consumer, places),) = first.read.items()
    reader: Any = trial.model.get_submodule(consumer)
    kernel = tuple(getattr(reader, "kernel_size", ()))
    if not is_cuttable(reader) or (kernel and len(places) > 1):
        return None
    width = len(places) * math.prod(kernel)
    if shape_of(reader)[1] != n_units * width:
        return None
    return (consumer, n_units, width), list(first.passed)


def _are_own(traces: dict[int, Trace], first: Trace) -> bool:
    """Whether units arrive everywhere at separate positions, and nowhere else."""

    def owned(found: dict[str, set[int]], like: dict[str, set[int]], unit: int) -> bool:
        each = {name: len(places) for name, places in like.items()}
        return found == {n: set(range(unit * k, (unit + 1) * k)) for n, k in each.items()}

    return all(
        trace.closed
        and owned(trace.read, first.read, unit)
        and owned(trace.passed, first.passed, unit)
        for unit, trace in traces.items()
    )
