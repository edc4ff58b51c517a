"""Masks on parameters, whichever way a layer uses these.

A masked ``weight`` is an attribute that is computed, when it is read, from the parameter
``weight_orig`` and the buffer ``weight_mask``: the names of :mod:`torch.nn.utils.prune`, so that
state dicts are interchangeable. Unlike the hooks of that module it also holds where a parameter
is read outside the ``forward`` of its module, as convolutions of factors and attention do; unlike
:mod:`torch.nn.utils.parametrize` it can be pickled.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from matfact.torch._factors import FactorModule
from matfact.torch._matrices import matricized

#: Which parameters to prune, from a module and the name of one of its parameters.
Predicate = Callable[[nn.Module, str], bool]


class LayerCollapseWarning(UserWarning):
    """Pruning has left nothing of a layer, so that nothing flows through it any more."""


def _masked_value(name: str) -> property:
    """Return the attribute that reads as the masked parameter."""

    def get(module: Any) -> Tensor:
        return getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")

    return property(get, doc=f"`{name}`, zero where it is pruned.")


class _Masked:
    """Marks the classes that :func:`_masked_class` makes."""

    _unmasked: type
    _names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_masked, (self._unmasked, self._names), self.__dict__


@functools.cache
def _masked_class(base: type, names: tuple[str, ...]) -> type:
    """Return the subclass of `base` whose attributes `names` are masked parameters."""
    attributes = {name: _masked_value(name) for name in names}
    marks = {"_unmasked": base, "_names": names, "__module__": base.__module__}
    return type(f"Masked{base.__name__}", (_Masked, base), {**attributes, **marks})


def _new_masked(base: type, names: tuple[str, ...]) -> Any:
    """Return an empty module, for copies and pickles."""
    made: Any = _masked_class(base, names)
    return made.__new__(made)


def _set_names(module: Any, names: tuple[str, ...]) -> None:
    """Let the attributes `names` of a module, and no others, read as masked parameters."""
    base = type(module)._unmasked if isinstance(module, _Masked) else type(module)
    module.__class__ = _masked_class(base, names) if names else base


@dataclasses.dataclass(frozen=True)
class Prunable:
    """A parameter that may be pruned.

    Attributes
    ----------
    label : str
        Its name in the network, ``"0.weight"`` for example, whether masked or not.
    module : torch.nn.Module
        The module it belongs to.
    name : str
        Its name there.
    """

    label: str
    module: nn.Module
    name: str

    @property
    def masked(self) -> bool:
        """Whether it has a mask, of this package or of :mod:`torch.nn.utils.prune`."""
        return f"{self.name}_orig" in self.module._parameters

    @property
    def original(self) -> Tensor:
        """The trained parameter itself."""
        name = f"{self.name}_orig" if self.masked else self.name
        return self.module.get_parameter(name)

    @property
    def values(self) -> Tensor:
        """Its values, zeros where it is pruned."""
        return self.original * self.mask if self.masked else self.original

    @property
    def mask(self) -> Tensor:
        """The mask, which this puts into place where there is none yet."""
        module: Any = self.module
        names = module._names if isinstance(module, _Masked) else ()
        if self.name not in names:
            if self.masked:
                self._drop_hook()
            else:
                original = module._parameters.pop(self.name)
                module.register_parameter(f"{self.name}_orig", original)
                mask = torch.ones_like(original, dtype=torch.bool)
                module.register_buffer(f"{self.name}_mask", mask)
            _set_names(module, (*names, self.name))
        return module.get_buffer(f"{self.name}_mask")

    def _drop_hook(self) -> None:
        """Take over a mask of :mod:`torch.nn.utils.prune`."""
        hooks = self.module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if getattr(hook, "_tensor_name", None) == self.name:
                del hooks[key]
        vars(self.module).pop(self.name, None)

    @torch.no_grad()
    def unmask(self) -> None:
        """Remove the mask, and leave zeros where it pruned."""
        mask, original, module = self.mask, self.original, self.module
        assert isinstance(module, _Masked)
        _set_names(module, tuple(name for name in module._names if name != self.name))
        del module._parameters[f"{self.name}_orig"], module._buffers[f"{self.name}_mask"]
        module.register_parameter(self.name, original)  # type: ignore[arg-type]
        original.mul_(mask)

    @torch.no_grad()
    def restrict(self, mask: Tensor) -> None:
        """Replace the mask, and set pruned values to zero."""
        self.mask.copy_(mask)
        # In place: whatever was derived from the parameter sees that it has changed.
        self.original.mul_(self.mask)


def prunable_parameters(model: nn.Module, prunable: Predicate | None = None) -> list[Prunable]:
    """Return the parameters of a network that may be pruned, in its order.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    prunable : callable, optional
        Says whether to prune a parameter, from its module and its name there. By default the
        weights of linear and convolutional layers, and the values of factorized ones.

    Returns
    -------
    list of Prunable
        A parameter that several modules share comes once.
    """
    predicate = _is_weight if prunable is None else prunable
    found: list[Prunable] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = parameter_name.removesuffix("_orig")
            if f"{name}_mask" not in module._buffers:
                name = parameter_name
            if id(parameter) not in seen and predicate(module, name):
                seen.add(id(parameter))
                found.append(Prunable(f"{prefix}.{name}" if prefix else name, module, name))
    if not found:
        raise ValueError("prunable must name at least one parameter of the model, got none.")
    return found


def _is_weight(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a layer, or the values of a factor."""
    if isinstance(module, FactorModule):
        return name == "values"
    return name == "weight" and (isinstance(module, _ConvNd) or matricized(module) is not None)


def collapsed_layers(parameters: Iterable[Prunable]) -> list[str]:
    """Return the labels of parameters of which nothing is kept, and warn if there are any."""
    labels = [p.label for p in parameters if not bool(p.mask.any())]
    if labels:
        warnings.warn(
            f"Nothing is kept of {', '.join(labels)}: the network has collapsed there. Keep more, "
            "or use scope='layer' or method='synflow'.",
            LayerCollapseWarning,
            stacklevel=3,
        )
    return labels


def masked_parameters(model: nn.Module) -> list[Prunable]:
    """Return all parameters with a mask."""
    everything = prunable_parameters(model, lambda module, name: True)
    return [parameter for parameter in everything if parameter.masked]


def make_permanent(model: nn.Module) -> nn.Module:
    """Remove all masks, and leave zeros where they pruned.

    Parameters
    ----------
    model : torch.nn.Module
        A pruned network, changed in place; its parameters have their old names again.

    Returns
    -------
    torch.nn.Module
        `model`.
    """
    for parameter in masked_parameters(model):
        parameter.unmask()
    return model


def to_torch_prune(model: nn.Module) -> nn.Module:
    """Turn all masks into those of :mod:`torch.nn.utils.prune`, for tools that expect these.

    Parameters
    ----------
    model : torch.nn.Module
        A pruned network, changed in place: a masked ``weight`` becomes the parameter
        ``weight_orig`` and the buffer ``weight_mask``.

    Returns
    -------
    torch.nn.Module
        `model`.
    """
    for parameter in masked_parameters(model):
        mask = parameter.mask
        parameter.unmask()
        prune.custom_from_mask(parameter.module, parameter.name, mask)
    return model
