"""Removal of units from the layers of a block, and restoring them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.layers._matricized import matricized
from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._trial import is_depthwise


def cut_units(
    model: nn.Module,
    block: NeuronBlock,
    kept: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> None:
    """Remove units of a block. Modules get new tensors; existing tensors do not change.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    block : NeuronBlock
        The block.
    kept : Tensor of int
        Units to keep.
    weight : Tensor of shape (n_outputs, len(kept) * width)
        New weight of the consumer, as a matrix.
    bias : Tensor of shape (n_outputs,), optional
        New bias of the consumer.
    """
    for name in block.producers:
        module: Any = model.get_submodule(name)
        axis = 1 if hasattr(module, "nf") else 0
        _take(module._parameters, block.n_units, kept, axis)
        _resize(module, ("out_features", "out_channels", "nf"), block.n_units, kept)
    for name in block.between:
        module = model.get_submodule(name)
        _take(module._parameters, block.n_units, kept, 0)
        _take(module._buffers, block.n_units, kept, 0)
        counts = ("in_channels", "out_channels", "groups") if is_depthwise(module) else ()
        _resize(module, counts or ("num_features", "num_parameters"), block.n_units, kept)
    _replace_inputs(model.get_submodule(block.consumer), weight, bias)


def _replace_inputs(consumer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Set the narrowed weight of the consumer."""
    old = consumer.weight
    new = weight.T if hasattr(consumer, "nf") else weight.reshape(len(weight), -1, *old.shape[2:])
    consumer.weight = _parameter(new, old)
    if bias is not None:
        consumer.bias = _parameter(bias, consumer.bias)
    n_inputs = weight.shape[1] // old[0, 0].numel()
    for attribute in ("in_features", "in_channels", "nx"):
        if attribute in vars(consumer):
            setattr(consumer, attribute, n_inputs)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(like).clone(), requires_grad=like.requires_grad)


def _take(tensors: dict[str, Any], n_units: int, kept: Tensor, axis: int) -> None:
    """Keep the entries of units in parameters and buffers; biases have a single axis."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.ndim == 0:
            continue
        along = min(axis, tensor.ndim - 1)
        each, rest = divmod(tensor.shape[along], n_units)
        if rest or not each:  # such as a parameter common to all units
            continue
        places = (kept[:, None] * each + torch.arange(each)).flatten().to(tensor.device)
        taken = tensor.detach().index_select(along, places)
        tensors[name] = _parameter(taken, tensor) if isinstance(tensor, nn.Parameter) else taken


def _resize(module: Any, attributes: Sequence[str], n_units: int, kept: Tensor) -> None:
    """Update attributes that count units or their positions."""
    for attribute in attributes:
        if each := vars(module).get(attribute, 0) // n_units:
            setattr(module, attribute, each * len(kept))


def modules_of(model: nn.Module, block: NeuronBlock) -> list[nn.Module]:
    """Return the modules changed by a removal."""
    return [model.get_submodule(n) for n in (*block.producers, *block.between, block.consumer)]


def way_back(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that restores the parameters, buffers and sizes of modules."""
    tensors = ("_parameters", "_buffers")
    before = [(m, {**vars(m), **{name: dict(vars(m)[name]) for name in tensors}}) for m in modules]

    def restore() -> None:
        for module, attributes in before:
            vars(module).update(attributes)

    return restore


def weight_on(model: nn.Module, block: NeuronBlock, kept: Tensor) -> Tensor:
    """Return the part of the consumer's weight for some units, as a matrix."""
    view = matricized(model.get_submodule(block.consumer))
    assert view is not None
    (matrix,) = view.matrices()
    return matrix.unflatten(1, (block.n_units, block.width))[:, kept.to(matrix.device)].flatten(1)
