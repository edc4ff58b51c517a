"""What forward passes leave in a network, so that passes to compare start alike."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import torch
from torch import Tensor, nn

#: Attributes whose values are kept as they are.
_PLAIN = (bool, int, float, str, type(None))
#: What each module has, parameters, buffers and modules among them.
OF_ALL_MODULES = frozenset(vars(nn.Module()))


class Traces:
    """Buffers and attributes of the modules of a network, as they are now.

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
        # Modules that are replaced meanwhile need not stay in memory.
        self._attributes = [(weakref.ref(module), _attributes(module)) for module in modules]

    def restore(self) -> bool:
        """Put them back; return whether a pass has left a tensor that another could read."""
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
                    # A copy, or the next pass would write to what is kept here.
                    vars(module)[name] = value.copy() if isinstance(value, (list, dict)) else value
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain values, tensors, and lists and dictionaries that a module has of its own."""
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
    """Whether an attribute is what it was."""
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
    """Whether tensors hold the same values, NaN included."""
    if a.is_sparse or a.is_quantized or a.is_nested:
        return True
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
