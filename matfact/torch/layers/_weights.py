"""The effective weight and bias of a layer, however they are stored."""

from __future__ import annotations

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

from matfact._layers import SUFFIXES, others_in_layer
from matfact.torch.running._batches import eval_mode

_COMPUTING = (
    prune.BasePruningMethod,
    WeightNorm,
    SpectralNorm,
    SpectralNormStateDictHook,
    SpectralNormLoadStateDictPreHook,
)


def is_computing(hook: Any) -> bool:
    """Whether a hook only computes a tensor of a module from others."""
    return isinstance(getattr(hook, "hook", hook), _COMPUTING)


def effective(layer: Any, name: str) -> Any:
    """Return the tensor `name` that `layer` uses in eval mode.

    Hooks that compute it, such as those of `torch.nn.utils.prune`, only set the attribute when
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
    names = {f"bias{suffix}" for suffix in ("", *SUFFIXES)}
    return name in names or name.startswith("parametrizations.bias.")


def others(layer: nn.Module) -> list[str]:
    """Return the names of tensors and modules of `layer` other than its weight and bias."""
    held = {**layer._parameters, **layer._buffers, **layer._modules}
    held.pop("parametrizations", None)
    return others_in_layer(name for name, value in held.items() if value is not None)


def place(parameter: Tensor) -> tuple[Any, ...]:
    """Return a key for the memory of `parameter`; tied parameters share it."""
    if parameter.is_meta or is_lazy(parameter) or not parameter.numel():
        return (id(parameter),)
    return parameter.device, parameter.data_ptr()


def tied_places(model: nn.Module) -> dict[tuple[Any, ...], dict[nn.Module, str]]:
    """Return the places of parameters shared by several modules, with the name in each."""
    owners: dict[tuple[Any, ...], dict[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(place(parameter), {}).setdefault(module, name)
    for pair in _declared_ties(model):
        joint = {module: name for p in pair for module, name in owners[place(p)].items()}
        owners |= {place(p): joint for p in pair}
    return {at: names for at, names in owners.items() if len(names) > 1}


def _declared_ties(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of parameters on the meta device that `transformers` says are one.

    They are offloaded, and no longer share memory.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = ((parameters.get(own), parameters.get(other)) for own, other in declared.items())
    return [(p, q) for p, q in pairs if p is not None and q is not None and p.is_meta and q.is_meta]


def is_finite(weight: Tensor) -> bool:
    """Whether all entries of `weight` are finite."""
    if not weight.numel():
        return True
    ends = torch.aminmax(torch.view_as_real(weight) if weight.is_complex() else weight)
    return all(bool(torch.isfinite(end)) for end in ends)
