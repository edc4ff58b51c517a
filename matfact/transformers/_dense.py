"""Compressed networks turned back to those of the architecture, with dense weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from matfact.torch.checkpoint._building import built
from matfact.torch.layers._inherit import move_hooks
from matfact.torch.layers._matricized import distinct_layers
from matfact.torch.layers._narrowed import narrowed_tensors
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._offloaded import HOOK, is_offloaded
from matfact.torch.training.adapters import refuse_adapted


def make_dense(model: Any, dtype: torch.dtype | None) -> None:
    """Replace the factorized layers of a network in place by layers of its architecture.

    Raises
    ------
    ValueError
        If layers are offloaded, have adapters, or were narrowed, before any is replaced.
    """
    refuse_adapted(model)
    if narrowed := narrowed_tensors(model):
        raise ValueError(
            f"model must have all units of its configuration, but {min(narrowed)!r} was narrowed "
            "by prune_neurons."
        )
    kinds = (FactorizedLinear, FactorizedConv)
    layers = [each for each in distinct_layers(model) if isinstance(each[1], kinds)]
    config = copy.deepcopy(model.config)
    architecture: Any = built(lambda: type(model)(config))
    held = dict(architecture.named_modules(remove_duplicate=False))
    for names, layer in layers:
        for name in names:
            weight = getattr(held.get(name), "weight", None)
            if weight is None or tuple(weight.shape) != _shape(layer, held[name]):
                raise ValueError(
                    "model must be what its configuration describes, without adapters, but that "
                    f"has no weight like that of the layer {name!r}."
                )
        if is_offloaded(layer):
            raise ValueError(f"model must be in memory, but the layer {names[0]!r} is offloaded.")
    for names, layer in layers:
        new = _dense(layer, held[names[0]]).to(dtype)
        move_hooks(new, layer, names[0])
        for name in names:
            model.set_submodule(name, new)


def _shape(layer: Any, own: Any) -> tuple[int, ...]:
    """Return the shape of the dense weight of a factorized layer, as `own` stores it."""
    if isinstance(layer, FactorizedConv):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    shape = layer.out_features, layer.in_features
    return shape[::-1] if isinstance(own, Conv1D) else shape


def _dense(layer: Any, own: Any) -> nn.Module:
    """Return the layer of the architecture, `own`, with the weight of a factorized one."""
    weight = layer.to_dense().weight.detach()
    own.weight = nn.Parameter(weight.T.contiguous() if isinstance(own, Conv1D) else weight)
    own.bias = layer.bias
    if HOOK in vars(layer):  # it only moves inputs
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(own, vars(layer)[HOOK])
    return own.train(layer.training)
