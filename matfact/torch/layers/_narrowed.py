"""What has become of the widths of a network that has fewer units than its code builds.

The network that was pruned remembers the shapes its tensors had before, so that a checkpoint of it
can say which layers of the full network to narrow, and no other network is ever resized.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from matfact._safetensors import is_sizes

_Shape = tuple[int, ...]
#: Tensors of a module that have an entry for each unit, or places for each.
_LEAVES = ("weight", "bias", "running_mean", "running_var")
#: Attribute of the network in which shapes are remembered.
_MARK = "_narrowed"


class Narrowed(NamedTuple):
    """Shape of a tensor before and after units were removed."""

    full: _Shape
    kept: _Shape


def remember(model: nn.Module, dense: nn.Module) -> None:
    """Let `model` know which of its tensors have been narrowed since it was `dense`."""
    before = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    known: dict[str, Narrowed] = dict(vars(model).get(_MARK, {}))
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name.rpartition(".")[2] in _LEAVES and before.get(name, shape) != shape:
            full = known[name].full if name in known else before[name]
            known[name] = Narrowed(full, shape)
    vars(model)[_MARK] = known


def narrowed_tensors(model: nn.Module) -> dict[str, Narrowed]:
    """Return the tensors of a network, or of networks in it, that have been narrowed."""
    return {
        f"{prefix}.{name}" if prefix else name: shapes
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, shapes in vars(module).get(_MARK, {}).items()
    }


def parsed(record: Any) -> dict[str, Narrowed]:
    """Return what a checkpoint says of narrowed tensors, or raise ``ValueError``."""
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
    """Narrow the tensors of a full network as recorded; where what follows fails, not at all."""
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
    """Return the tensors that have their full shape, with the one they get."""
    found: dict[str, dict[str, _Shape]] = {}
    own = model.state_dict(keep_vars=True)
    for name, shapes in record.items():
        module, _, leaf = name.rpartition(".")
        if name in own and tuple(own[name].shape) == shapes.full:
            found.setdefault(module, {})[leaf] = shapes.kept
    return found


def _narrow(module: Any, shapes: Mapping[str, _Shape]) -> None:
    """Give tensors of a module fewer units; which of their numbers stay is of no matter."""
    old = module._parameters.get("weight")
    for name, shape in shapes.items():
        tensors = module._parameters if name in module._parameters else module._buffers
        tensor = tensors[name]
        if tuple(tensor.shape) == shape:  # the module has another name
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
    """Let a module know its widths, those of its `new` weight."""
    held = vars(module)
    if "kernel_size" in held:
        if old.shape[1] == new.shape[1]:  # each group has lost none of its inputs
            module.groups = max(1, module.groups * new.shape[0] // old.shape[0])
        module.out_channels, module.in_channels = new.shape[0], new.shape[1] * module.groups
    elif "nf" in held:  # the layer of `transformers` that keeps its weight transposed
        module.nx, module.nf = new.shape
    elif "in_features" in held:
        module.out_features, module.in_features = new.shape
    elif "num_parameters" in held:
        module.num_parameters = new.shape[0]
