"""The effective weight and bias of a layer, however they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from matfact.torch.running._batches import eval_mode

_COMPUTING = (
    prune.BasePruningMethod,
    WeightNorm,
    SpectralNorm,
    SpectralNormStateDictHook,
    SpectralNormLoadStateDictPreHook,
)
#: Suffixes that pruning and normalization append to tensor names.
_SUFFIXES = ("", "_orig", "_mask", "_g", "_v", "_u")


def is_computing(hook: Any) -> bool:
    """Whether a hook only computes a tensor of a module from others."""
    return isinstance(getattr(hook, "hook", hook), _COMPUTING)


def effective(layer: Any, name: str) -> Any:
    """Return the tensor `name` that `layer` uses in eval mode.

    Hooks that compute it, such as those of :mod:`torch.nn.utils.prune`, only set the attribute when
    the layer is called; until then it is outdated.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(layer)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(layer)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(layer, do_power_iteration=False)
    if parametrize.is_parametrized(layer, name):
        with eval_mode(layer.parametrizations[name]):  # some change whenever they are read
            return getattr(layer, name)
    return getattr(layer, name, None)


def is_frozen(layer: nn.Module, name: str) -> bool:
    """Whether all tensors that store the weight (or the bias) are frozen."""
    stored = (p for own, p in layer.named_parameters() if _is_bias(own) == (name == "bias"))
    return not any(parameter.requires_grad for parameter in stored)


def _is_bias(name: str) -> bool:
    names = {f"bias{suffix}" for suffix in _SUFFIXES}
    return name in names or name.startswith("parametrizations.bias.")


def others(layer: nn.Module) -> Iterator[str]:
    """Yield the names of tensors and modules of `layer` other than its weight and bias."""
    known = {f"{name}{suffix}" for name in ("weight", "bias") for suffix in _SUFFIXES}
    for held in (layer._parameters, layer._buffers, layer._modules):
        yield from (n for n, value in held.items() if value is not None and n not in known)


def place(parameter: Tensor) -> tuple[Any, ...]:
    """Return a key for the memory of `parameter`; tied parameters share it."""
    if parameter.is_meta or is_lazy(parameter) or not parameter.numel():
        return (id(parameter),)
    return parameter.device, parameter.data_ptr()


def tied_places(model: nn.Module) -> set[tuple[Any, ...]]:
    """Return the owners of parameters shared by several modules."""
    owners: dict[tuple[Any, ...], set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(place(parameter), set()).add(module)
    return {at for at, modules in owners.items() if len(modules) > 1}


def is_finite(weight: Tensor) -> bool:
    """Whether all entries of `weight` are finite."""
    if not weight.numel():
        return True
    ends = torch.aminmax(torch.view_as_real(weight) if weight.is_complex() else weight)
    return all(bool(torch.isfinite(end)) for end in ends)
