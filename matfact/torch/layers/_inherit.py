"""Transfer of dtype, device, mode, hooks and bias from a layer to its replacement."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn

from matfact.torch._warnings import CompressionWarning
from matfact.torch.layers._weights import effective, is_computing, is_frozen
from matfact.torch.running._offloaded import HOOK, hook_in_memory, shared_maps


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`, including tensors that hooks have computed.

    Offloaded tensors are not copied.
    """
    memo: dict[int, Any] = shared_maps(model) | {
        id(value): value.detach().clone()  # torch cannot copy non-leaf tensors
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


def inherit(new: Any, old: Any, name: str) -> None:
    """Give `new` the dtype, device, mode, hooks, bias and frozen parameters of `old`.

    Its tensors stay in memory even if those of `old` are offloaded; they must be fetched by now.
    Warn, with the layer's `name`, if something cannot be transferred.
    """
    weight, bias = effective(old, "weight"), effective(old, "bias")
    device = None if weight.is_meta else weight.device  # meta weights have no device
    new.to(device=device, dtype=weight.dtype).train(old.training)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True))
    for own, parameter in new.named_parameters():
        parameter.requires_grad_(not is_frozen(old, "bias" if own == "bias" else "weight"))
    move_hooks(new, old, name)
    if HOOK in vars(old):  # it only moves inputs, else the layer would have been rejected
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook_in_memory(old._hf_hook))


def is_moved_by_accelerate(layer: nn.Module) -> bool:
    """Whether accelerate has replaced ``forward`` only to move its inputs and fetch its weight."""
    held = vars(layer)
    kind, own = type(held.get(HOOK)), held.get("_old_forward")
    return (
        (kind.__module__, kind.__name__) == ("accelerate.hooks", "AlignDevicesHook")
        and getattr(own, "__func__", None) is type(layer).forward
        and getattr(held.get("forward"), "__wrapped__", None) == own
    )


def hooks_of(layer: nn.Module) -> dict[str, Any]:
    """Return the hook dictionaries of `layer`, by attribute."""
    return {k: held for k, held in vars(layer).items() if "_hooks" in k and isinstance(held, dict)}


def move_hooks(new: nn.Module, old: nn.Module, name: str) -> None:
    """Give `new` the hooks of `old`, except those that compute its weight.

    The dictionaries are shared, so that handles remove hooks from both layers. Warn, with the
    layer's `name`, if hooks on gradients of its parameters are lost.
    """
    every: dict[int, Any] = old._load_state_dict_pre_hooks
    bound = [hook for hook in every.values() if not is_computing(hook)]
    for kind, hooks in hooks_of(old).items():
        for key in [key for key, hook in hooks.items() if is_computing(hook)]:
            del hooks[key]
        if kind != "_load_state_dict_pre_hooks":
            own = vars(new)[kind]
            vars(new)[kind] = type(hooks)({**own, **hooks}) if own else hooks
    for hook in bound:  # they hold a reference to their module
        register: Any = new._register_load_state_dict_pre_hook
        register(hook.hook, with_module=hook.with_module)
    vars(new)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]
    parameters: Any = old.named_parameters()
    lost = [n for n, p in parameters if p._backward_hooks or p._post_accumulate_grad_hooks]
    if lost:
        message = f"{name}: hooks of its parameters are lost, those of {', '.join(lost)}."
        warnings.warn(message, CompressionWarning, stacklevel=6)
