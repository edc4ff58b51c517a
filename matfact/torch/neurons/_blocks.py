"""Hidden units of a network: which layers write them, and which one reads them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from matfact.torch._batches import eval_mode, forward
from matfact.torch._matrices import matricized
from matfact.torch.capture import layer_input


@dataclasses.dataclass(frozen=True)
class NeuronBlock:
    """Hidden units that some layers write and one layer reads.

    Attributes
    ----------
    producers : tuple of str
        Names of the layers each of whose outputs belongs to a unit: one, or two where one gates
        the other.
    between : tuple of str
        Names of the normalizations, and other modules, with parameters of each unit.
    consumer : str
        Name of the layer that reads the units, and no other does.
    n_units : int
        How many there are.
    width : int
        Inputs of the consumer for each unit: places of its kernel, or of a flattened image.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str
    n_units: int
    width: int


@dataclasses.dataclass
class _Trace:
    """Where an unusual output of one layer has come up."""

    read: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    passed: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    closed: bool = False


def find_blocks(model: nn.Module, batch: Any) -> list[NeuronBlock]:
    """Return all hidden units that can be removed, by what flows where in a forward pass.

    An output of a layer is replaced by NaN, and the layers where NaN arrives read it. Units
    count where one layer alone reads them, in places of their own, and where the network still
    runs without one of them: those of linear and convolutional layers, with any activation,
    gates, batch normalization and pooling in between, but not those of residual streams and
    attention heads. No knowledge of architectures is used.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batch : tensor, tuple or mapping
        What it is called with; a few samples serve.

    Returns
    -------
    list of NeuronBlock
        In the order in which consumers are called.
    """
    layers = {name: layer for name, layer in model.named_modules() if _is_plain(layer)}
    found: dict[tuple[str, int, int], tuple[list[str], list[str]]] = {}
    with eval_mode(model), torch.no_grad():
        order = _call_order(model, layers, batch)
        for name in order:
            n_units = _n_outputs(layers[name])
            traces = [_probe(model, layers, name, unit, batch) for unit in (0, n_units - 1)]
            match = _match(traces, layers, n_units)
            if match is not None:
                consumer, width, between = match
                producers, modules = found.setdefault((consumer, n_units, width), ([], []))
                producers.append(name)
                modules.extend(m for m in between if m not in modules)
        blocks = [
            NeuronBlock(tuple(producers), tuple(between), consumer, n_units, width)
            for (consumer, n_units, width), (producers, between) in found.items()
        ]
        blocks = [block for block in blocks if _runs_without_a_unit(model, block, batch)]
    return sorted(blocks, key=lambda block: order.index(block.consumer))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer has one dense weight, which can be cut."""
    plain = matricized(layer) is not None and "weight" in layer._parameters
    return plain and getattr(layer, "groups", 1) == 1


def _n_outputs(layer: nn.Module) -> int:
    """Return the number of outputs of a layer."""
    view = matricized(layer)
    assert view is not None
    return view.matrices()[0].shape[0]


def channel_axis(layer: Any, x: Tensor) -> int:
    """Return the axis of the outputs, or inputs, of `layer` that counts channels."""
    return x.ndim - 1 - (len(layer.kernel_size) if hasattr(layer, "kernel_size") else 0)


def _call_order(model: nn.Module, layers: dict[str, nn.Module], batch: Any) -> list[str]:
    """Return the names of layers that a forward pass calls once, in that order."""
    calls: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, layer in layers.items()
    ]
    with removed(handles):
        output = forward(model, batch)
    if _has_nan(output):
        raise ValueError("batch must give outputs without NaN, which marks units here.")
    return [name for name in calls if calls.count(name) == 1]


def _probe(
    model: nn.Module, layers: dict[str, nn.Module], name: str, unit: int, batch: Any
) -> _Trace:
    """Follow one output of a layer to the layers that read it, which get zeros instead."""
    trace = _Trace()

    def mark(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.select(channel_axis(layer, output), unit).fill_(torch.nan)
        return output

    def read(layer: nn.Module, args: Any, kwargs: Any, *, name: str) -> Any:
        x = layer_input(args, kwargs)
        places = _nan_places(x, channel_axis(layer, x))
        if not places:
            return None
        trace.read[name] = sorted({*trace.read.get(name, []), *places})
        return (torch.where(torch.isnan(x), 0.0, x), *args[1:]), {}

    def passing(module: nn.Module, args: Any, *, name: str) -> None:
        if places := _nan_places(args[0], 1):
            trace.passed[name] = places

    handles = [layers[name].register_forward_hook(mark)]
    for other, module in model.named_modules():
        if matricized(module) is not None:
            hook = _named(read, other)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif _is_between(module):
            handles.append(module.register_forward_pre_hook(_named(passing, other)))
    with removed(handles):
        try:
            trace.closed = not _has_nan(forward(model, batch))
        except (RuntimeError, ValueError, IndexError):  # of code that looks at values
            trace.closed = False
    return trace


def _named(hook: Any, name: str) -> Any:
    return lambda *args: hook(*args, name=name)


def _is_between(module: nn.Module) -> bool:
    """Whether a module holds parameters, or statistics, of each channel."""
    return isinstance(module, (_NormBase, nn.PReLU))


def _match(
    traces: Sequence[_Trace], layers: dict[str, nn.Module], n_units: int
) -> tuple[str, int, list[str]] | None:
    """Return the one reader of units, its inputs for each, and what they pass; if it is so."""
    first = traces[0]
    if n_units < 2 or len(first.read) != 1:
        return None
    consumer, places = next(iter(first.read.items()))
    width = len(places)
    kernel = getattr(layers.get(consumer), "kernel_size", ())
    for trace, unit in zip(traces, (0, n_units - 1), strict=True):
        own = {consumer: list(range(unit * width, (unit + 1) * width))}
        if not trace.closed or trace.read != own or any(p != [unit] for p in trace.passed.values()):
            return None
    if consumer not in layers or (kernel and width > 1):
        return None
    for size in kernel:
        width *= size
    return consumer, width, list(first.passed)


def _nan_places(x: Any, axis: int) -> list[int]:
    """Return the places along `axis` where `x` has NaN."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return []
    marked = torch.isnan(x).movedim(axis, 0).flatten(1).any(dim=1)
    return torch.nonzero(marked).flatten().tolist()


def _has_nan(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(torch.isnan(output).any())
    if hasattr(output, "values"):
        output = list(output.values())
    return isinstance(output, (list, tuple)) and any(_has_nan(item) for item in output)


def _runs_without_a_unit(model: nn.Module, block: NeuronBlock, batch: Any) -> bool:
    """Whether the network runs when a unit is cut from it."""
    names = (*block.producers, *block.between, block.consumer)
    modules = [model.get_submodule(name) for name in names]
    before = [
        {**vars(m), "_parameters": dict(m._parameters), "_buffers": dict(m._buffers)}
        for m in modules
    ]
    kept = torch.arange(1, block.n_units)
    consumer = matricized(modules[-1])
    assert consumer is not None
    try:
        cut_units(model, block, kept, consumer.matrices()[0][:, block.width :])
        forward(model, batch)
    except Exception:  # whatever the network's code makes of other shapes
        return False
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).update(attributes)
    return True


def cut_units(model: nn.Module, block: NeuronBlock, kept: Tensor, weight: Tensor) -> None:
    """Leave only some units of a block, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    block : NeuronBlock
        Its units.
    kept : Tensor of int
        Which units stay.
    weight : Tensor of shape (n_outputs, len(kept) * width)
        New weight of the consumer, as a matrix.
    """
    for name in (*block.producers, *block.between):
        module: Any = model.get_submodule(name)
        axis = 1 if matricized(module) is not None and hasattr(module, "nf") else 0
        _take(module._parameters, block.n_units, kept, axis)
        _take(module._buffers, block.n_units, kept, 0)
        _resize(module, ("out_features", "out_channels", "num_features", "nf"), len(kept))
        _resize(module, ("num_parameters",), len(kept))
    consumer: Any = model.get_submodule(block.consumer)
    old = consumer.weight
    shape = (weight.shape[0], -1, *old.shape[2:])
    new = weight.T if hasattr(consumer, "nf") else weight.reshape(shape)
    consumer.weight = nn.Parameter(new.to(old).clone(), requires_grad=old.requires_grad)
    n_inputs = weight.shape[1] // (old[0, 0].numel() if old.ndim > 2 else 1)
    _resize(consumer, ("in_features", "in_channels", "nx"), n_inputs)


def _take(tensors: dict[str, Any], n_units: int, kept: Tensor, axis: int) -> None:
    """Keep the entries of units in parameters or buffers; biases have one axis only."""
    for name, tensor in tensors.items():
        if (
            tensor is None
            or tensor.ndim == 0
            or tensor.shape[min(axis, tensor.ndim - 1)] != n_units
        ):
            continue
        taken = tensor.detach().index_select(min(axis, tensor.ndim - 1), kept.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            taken = nn.Parameter(taken, requires_grad=tensor.requires_grad)
        tensors[name] = taken


def _resize(module: Any, attributes: Sequence[str], size: int) -> None:
    for attribute in attributes:
        if attribute in vars(module):
            setattr(module, attribute, size)


@contextlib.contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks on leaving."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
