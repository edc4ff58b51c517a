"""State that forward passes leave in a network, to restore it between passes."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import torch
from torch import Tensor, nn

#: Types of attributes that are not copied.
_PLAIN = (bool, int, float, str, type(None))
#: Attributes of every module, such as parameters, buffers and submodules.
OF_ALL_MODULES = frozenset(vars(nn.Module()))


class Traces:
    """Snapshot of the buffers and attributes of a network's modules.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._buffers = [
            (weakref.ref(module), name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]
        # Weak references, so that replaced modules need not stay in memory.
        self._attributes = [(weakref.ref(module), _attributes(module)) for module in modules]

    def restore(self) -> bool:
        """Restore the state; return whether a pass has left a tensor that another could read."""
        found = False
        for reference, name, buffer, values in self._buffers:
            module = reference()
            if module is None or name not in module._buffers:
                continue
            present = module._buffers[name]
            if present is not buffer or not _same(buffer, values):
                found = True
                buffer.detach().copy_(values)
                module._buffers[name] = buffer
        for reference, before in self._attributes:
            module = reference()
            if module is None:
                continue
            now = _attributes(module)
            for name in now.keys() - before.keys():
                found |= _holds_tensors(now[name])
                del vars(module)[name]
            for name, value in before.items():
                if name not in now or not _is(now[name], value):
                    found |= _holds_tensors(value) or _holds_tensors(now.get(name))
                    # A copy, or the next pass would modify the snapshot.
                    vars(module)[name] = value.copy() if isinstance(value, (list, dict)) else value
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own plain values, tensors, lists and dictionaries."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in OF_ALL_MODULES:
            continue
        if isinstance(value, (list, dict)):
            found[name] = value.copy()
        elif isinstance(value, (Tensor, *_PLAIN)):
            found[name] = value
    return found


def _is(now: Any, before: Any) -> bool:
    """Whether an attribute is unchanged."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(now[key] is before[key] for key in now)
    if isinstance(now, list):
        return len(now) == len(before) and all(map(operator.is_, now, before))
    return isinstance(now, _PLAIN) and now == before


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, (list, dict)):
        return any(isinstance(each, Tensor) for each in values)
    return isinstance(value, Tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors hold the same values, with NaN equal to NaN."""
    if a.is_sparse or a.is_quantized or a.is_nested:
        return True
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
