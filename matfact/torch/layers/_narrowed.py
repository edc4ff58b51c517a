"""Record of the original widths of a network with pruned units.

A pruned network stores the original shapes of its tensors, so that a checkpoint can say which
layers of the full network to narrow. No other network is ever resized.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from matfact._safetensors import is_sizes

_Shape = tuple[int, ...]
#: Tensors of a module with one or more entries per unit.
_LEAVES = ("weight", "bias", "running_mean", "running_var")
#: Attribute of the network that stores the shapes.
_MARK = "_narrowed"


class Narrowed(NamedTuple):
    """Shape of a tensor before and after units were removed."""

    full: _Shape
    kept: _Shape


def remember(model: nn.Module, dense: nn.Module) -> None:
    """Record in `model` which of its tensors have been narrowed compared with `dense`."""
    before = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    known: dict[str, Narrowed] = dict(vars(model).get(_MARK, {}))
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name.rpartition(".")[2] in _LEAVES and before.get(name, shape) != shape:
            full = known[name].full if name in known else before[name]
            known[name] = Narrowed(full, shape)
    vars(model)[_MARK] = known


def narrowed_tensors(model: nn.Module) -> dict[str, Narrowed]:
    """Return the narrowed tensors of a network, including networks inside it."""
    return {
        f"{prefix}.{name}" if prefix else name: shapes
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, shapes in vars(module).get(_MARK, {}).items()
    }


def parsed(record: Any) -> dict[str, Narrowed]:
    """Return the narrowed tensors listed in a checkpoint, or raise ``ValueError``."""
    try:
        found = {name: Narrowed(*shapes) for name, shapes in (record or {}).items()}
        fits = all(name.rpartition(".")[2] in _LEAVES for name in found) and all(
            is_sizes(full)
            and is_sizes(kept)
            and all(k <= n for k, n in zip(kept, full, strict=True))
            for full, kept in found.values()
        )
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("path must name a checkpoint that says how tensors were narrowed.")
    return {name: Narrowed(tuple(full), tuple(kept)) for name, (full, kept) in found.items()}


@contextlib.contextmanager
def narrowed(model: nn.Module, record: Mapping[str, Narrowed]) -> Iterator[None]:
    """Narrow the tensors of a full network as recorded; undo it if the block fails."""
    if not record:
        yield
        return
    undo = [(model, _attributes(model))]
    vars(model)[_MARK] = narrowed_tensors(model) | dict(record)
    try:
        for path, leaves in _by_module(model, record).items():
            module = model.get_submodule(path)
            undo.append((module, _attributes(module)))
            _narrow(module, leaves)
        yield
    except BaseException:
        for module, attributes in reversed(undo):
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a snapshot of a module."""
    held = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    return vars(module) | held


def _by_module(model: nn.Module, record: Mapping[str, Narrowed]) -> dict[str, dict[str, _Shape]]:
    """Return the tensors that still have their full shape, with their narrowed shape."""
    found: dict[str, dict[str, _Shape]] = {}
    own = model.state_dict(keep_vars=True)
    for name, shapes in record.items():
        module, _, leaf = name.rpartition(".")
        if name in own and tuple(own[name].shape) == shapes.full:
            found.setdefault(module, {})[leaf] = shapes.kept
    return found


def _narrow(module: Any, shapes: Mapping[str, _Shape]) -> None:
    """Resize tensors of a module; their values are arbitrary."""
    old = module._parameters.get("weight")
    for name, shape in shapes.items():
        tensors = module._parameters if name in module._parameters else module._buffers
        tensor = tensors[name]
        if tuple(tensor.shape) == shape:  # already narrowed under another name
            continue
        smaller = tensor.detach()[tuple(slice(n) for n in shape)].clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[name] = nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller
    new = module._parameters.get("weight")
    if old is not None and new is not None and old.shape != new.shape:
        _set_widths(module, old, new)
    if "num_features" in vars(module):
        module.num_features = next(iter(shapes.values()))[0]


def _set_widths(module: Any, old: Tensor, new: Tensor) -> None:
    """Set the width attributes of a module from its `new` weight."""
    held = vars(module)
    if "kernel_size" in held:
        if old.shape[1] == new.shape[1]:  # no group has lost inputs
            module.groups = max(1, module.groups * new.shape[0] // old.shape[0])
        module.out_channels, module.in_channels = new.shape[0], new.shape[1] * module.groups
    elif "nf" in held:  # Conv1D of `transformers`, with a transposed weight
        module.nx, module.nf = new.shape
    elif "in_features" in held:
        module.out_features, module.in_features = new.shape
    elif "num_parameters" in held:
        module.num_parameters = new.shape[0]
