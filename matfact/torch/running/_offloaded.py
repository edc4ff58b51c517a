"""Tensors that accelerate keeps on the host or on a disk, and fetches when a module is called."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Attribute of a module with a hook of accelerate.
HOOK = "_hf_hook"


def is_offloaded(module: nn.Module) -> bool:
    """Whether the tensors that `module` itself holds are offloaded."""
    return HOOK in vars(module) and bool(getattr(vars(module)[HOOK], "offload", False))


def refuse_offloaded(model: nn.Module) -> None:
    """Raise ``ValueError`` if tensors in `model` are offloaded: changes of them would be lost."""
    found = next((name for name, module in model.named_modules() if is_offloaded(module)), None)
    if found is not None:
        raise ValueError(
            f"model must hold all of its values in memory, but accelerate has offloaded those "
            f"of {found!r}: call remove_hook_from_module(model, recurse=True) of accelerate.hooks."
        )


def used_on(module: nn.Module) -> torch.device:
    """Return the device to which the tensors of an offloaded `module` are fetched."""
    return torch.device(vars(module)[HOOK].execution_device)


@contextlib.contextmanager
def fetched(*modules: nn.Module) -> Iterator[None]:
    """Hold offloaded tensors of `modules`, and of modules inside of them, where they are used.

    Calling a module fetches its tensors; this is for code that reads them. What it has read stays
    valid, but the module then holds no values again.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            for each in module.modules():
                if is_offloaded(each) and _is_away(each):
                    from accelerate.utils import align_module_device

                    stack.enter_context(align_module_device(each))
        yield


def _is_away(module: nn.Module) -> bool:
    """Whether a tensor of an offloaded `module` is not fetched yet."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_meta for tensor in own)


def shared_maps(model: nn.Module) -> dict[int, Any]:
    """Return, by address, the maps with the offloaded tensors of `model`, which are only read."""
    maps = [vars(module)[HOOK].weights_map for module in model.modules() if is_offloaded(module)]
    return {id(each): each for each in maps}


def hook_in_memory(hook: Any) -> Any:
    """Return a hook of accelerate that moves inputs as `hook` does, but offloads nothing."""
    kept = copy.copy(hook)
    kept.offload, kept.weights_map = False, None
    return kept
