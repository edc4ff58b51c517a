"""Masks on parameters.

A masked ``weight`` is computed on every read from the parameter ``weight_orig`` and the buffer
``weight_mask``. State dicts are compatible with `torch.nn.utils.prune`, which uses the same
names. Unlike the hooks of that module, masks also apply if a parameter is read outside the
``forward`` of its module, as in attention and factorized convolutions. Unlike
`torch.nn.utils.parametrize`, masked modules can be pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune

from matfact.torch.layers._coded import is_coded
from matfact.torch.layers._factors import FactorModule
from matfact.torch.layers._matricized import is_linear, refusal
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._tensors import outside_inference_mode

#: Decides whether to prune a parameter, given its module and name.
Predicate = Callable[[nn.Module, str], bool]

_TRANSPOSED: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
#: Dtypes with the arithmetic needed by scores.
_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128
)  # fmt: skip


class LayerCollapseWarning(UserWarning):
    """Pruning has removed all weights of a layer, which blocks the flow through it."""


def _masked_value(name: str) -> property:
    """Return the property that computes a masked parameter."""

    def get(module: Any) -> Tensor:
        return getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")

    return property(get, doc=f"`{name}`, zero where it is pruned.")


class _Masked:
    """Marker of the classes made by `_masked_class`."""

    _unmasked: type
    _names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_masked, (self._unmasked, self._names), self.__dict__


@functools.cache
def _masked_class(base: type, names: tuple[str, ...]) -> type:
    """Return the subclass of `base` with masked parameters `names`."""
    attributes = {name: _masked_value(name) for name in names}
    marks = {"_unmasked": base, "_names": names, "__module__": base.__module__}
    return type(f"Masked{base.__name__}", (_Masked, base), {**attributes, **marks})


def _new_masked(base: type, names: tuple[str, ...]) -> Any:
    """Return an empty module, for copying and unpickling."""
    made: Any = _masked_class(base, names)
    return made.__new__(made)


def _set_names(module: Any, names: tuple[str, ...]) -> None:
    """Make exactly the attributes `names` of a module masked parameters."""
    base = type(module)._unmasked if isinstance(module, _Masked) else type(module)
    module.__class__ = _masked_class(base, names) if names else base


@dataclasses.dataclass(frozen=True)
class Prunable:
    """A parameter that may be pruned.

    Attributes
    ----------
    label : str
        Its name in the network without a mask, such as ``"0.weight"``.
    module : torch.nn.Module
        Its module.
    name : str
        Its name in the module.
    sharers : tuple of (torch.nn.Module, str)
        Other modules with the same parameter, and its names there. They share the mask.
    """

    label: str
    module: nn.Module
    name: str
    sharers: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def masked(self) -> bool:
        """Whether it has a mask of this package or of `torch.nn.utils.prune`."""
        return f"{self.name}_orig" in self.module._parameters

    @property
    def original(self) -> Tensor:
        """The trained parameter."""
        name = f"{self.name}_orig" if self.masked else self.name
        return self.module.get_parameter(name)

    @property
    def values(self) -> Tensor:
        """Its values, with zeros where it is pruned."""
        return self.original * self.mask if self.masked else self.original

    @property
    def mask(self) -> Tensor:
        """The mask, created if there is none yet."""
        if self.name not in _masked_names(self.module):
            present = self.module._buffers.get(f"{self.name}_mask")
            mask = torch.ones_like(self.original, dtype=torch.bool) if present is None else present
            for module, name in self.holders:
                _put_mask(module, name, mask)
        return self.module.get_buffer(f"{self.name}_mask")

    @property
    def holders(self) -> list[tuple[nn.Module, str]]:
        """All modules with this parameter, and its names there."""
        return [(self.module, self.name), *self.sharers]

    @torch.no_grad()
    def unmask(self) -> None:
        """Remove the mask, leaving zeros where it pruned."""
        self.settle()
        for module, name in self.holders:
            _set_names(module, tuple(n for n in _masked_names(module) if n != name))
            del module._buffers[f"{name}_mask"]
            _rename(module._parameters, f"{name}_orig", name)

    @torch.no_grad()
    def restrict(self, mask: Tensor) -> None:
        """Replace the mask."""
        self.mask.copy_(mask)

    @torch.no_grad()
    def settle(self) -> None:
        """Set pruned values to zero."""
        # In place, so that caches derived from the parameter notice the change.
        self.original.masked_fill_(~self.mask.bool(), 0)


def _masked_names(module: nn.Module) -> tuple[str, ...]:
    """Return the masked parameters of a module."""
    return module._names if isinstance(module, _Masked) else ()


def _put_mask(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask the parameter `name` of a module, with its existing mask or a new one."""
    if f"{name}_orig" in module._parameters:
        _drop_hook(module, name)
    else:
        _rename(module._parameters, name, f"{name}_orig")
    module.register_buffer(f"{name}_mask", mask)
    if name not in _masked_names(module):
        _set_names(module, (*_masked_names(module), name))


def _rename(parameters: dict[str, Any], old: str, new: str) -> None:
    """Rename a parameter in its place, to keep the order for optimizers."""
    renamed = {new if name == old else name: value for name, value in parameters.items()}
    parameters.clear()
    parameters.update(renamed)


def _drop_hook(module: nn.Module, name: str) -> None:
    """Take over a mask of `torch.nn.utils.prune`."""
    hooks = module._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "_tensor_name", None) == name:
            del hooks[key]
    vars(module).pop(name, None)


def prunable_parameters(model: nn.Module, prunable: Predicate | None = None) -> list[Prunable]:
    """Return the parameters of a network that may be pruned, in order.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    prunable : callable, optional
        Decides whether to prune a parameter, given its module and name. By default these are the
        weights of linear and convolutional layers with torch's own forward, and the values of
        factorized layers.

    Returns
    -------
    list of Prunable
        Shared parameters come once.
    """
    predicate = _is_weight if prunable is None else prunable
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = parameter_name.removesuffix("_orig")
            if f"{name}_mask" not in module._buffers:
                name = parameter_name
            label = f"{prefix}.{name}" if prefix else name
            holders.setdefault(id(parameter), []).append((label, module, name))
    found: list[Prunable] = []
    for held in holders.values():
        wanted = [holder for holder in held if predicate(holder[1], holder[2])]
        if wanted:
            sharers = tuple((m, n) for label, m, n in held if label != wanted[0][0])
            found.append(Prunable(*wanted[0], sharers))
    if not found:
        raise ValueError("prunable must name at least one parameter of the model, got none.")
    return found


def check_weights(parameters: Iterable[Prunable]) -> None:
    """Raise ``ValueError`` for parameters that cannot be scored and masked."""
    for p in parameters:
        original = p.original
        if original.is_meta or original.dtype not in _DTYPES:
            what = "on the meta device" if original.is_meta else f"of {original.dtype}"
            raise ValueError(
                f"prunable must name parameters in memory, of ordinary floating or complex dtypes; "
                f"{p.label} is {what}."
            )


@contextlib.contextmanager
def unchanged_on_failure(parameters: Iterable[Prunable]) -> Iterator[None]:
    """Restore masks if anything fails before weights are set to zero."""
    before = [(p, p.mask.clone() if p.masked else None) for p in parameters]
    try:
        yield
    except BaseException:
        for p, mask in before:
            if mask is not None:
                p.restrict(mask)
            elif p.masked:
                p.restrict(torch.ones_like(p.mask))
                p.unmask()
        raise


def unprunable_layers(model: nn.Module) -> dict[str, str]:
    """Return the linear and convolutional layers not pruned by default, and why."""
    layers = ((name, module) for name, module in model.named_modules() if is_layer(module))
    return {name: reason for name, module in layers if (reason := _refusal(module)) is not None}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, dense or factorized."""
    return isinstance(module, _ConvTransposeNd) or is_linear(module)


def _is_weight(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a layer, or the values of a factor."""
    if isinstance(module, FactorModule):
        return name == "values"
    return name == "weight" and is_layer(module) and _refusal(module) is None


def _refusal(module: nn.Module) -> str | None:
    """Return why the weight of a layer is not pruned by default, or None if it is."""
    if isinstance(module, (FactorizedLinear, FactorizedConv)):
        coded = any(is_coded(factor) for factor in module.modules())
        return "its factors store codes of few bits" if coded else None  # its factors are pruned
    if "weight" not in module._parameters and "weight_mask" not in module._buffers:
        return "weight computed from other parameters"
    if not isinstance(module, _ConvTransposeNd):
        return refusal(module)
    own = any(type(module).forward is kind.forward for kind in _TRANSPOSED)
    return None if own and "forward" not in vars(module) else "layer with a custom forward"


def collapsed_layers(parameters: Iterable[Prunable]) -> list[str]:
    """Return the labels of completely pruned parameters, and warn if there are any."""
    labels = [p.label for p in parameters if p.mask.numel() and not bool(p.mask.any())]
    if labels:
        warnings.warn(
            f"All weights of {', '.join(labels)} are pruned: the network has collapsed there. Keep "
            "more, or use scope='layer' or method='synflow'.",
            LayerCollapseWarning,
            stacklevel=4,
        )
    return labels


def masked_parameters(model: nn.Module) -> list[Prunable]:
    """Return all parameters with a mask."""
    everything = prunable_parameters(model, lambda module, name: True)
    return [parameter for parameter in everything if parameter.masked]


@outside_inference_mode
def make_permanent(model: nn.Module) -> nn.Module:
    """Remove all masks, leaving zeros where they pruned.

    Parameters
    ----------
    model : torch.nn.Module
        A pruned network, changed in place; its parameters get their old names back.

    Returns
    -------
    torch.nn.Module
        `model`.
    """
    for parameter in masked_parameters(model):
        parameter.unmask()
    return model


@outside_inference_mode
def to_torch_prune(model: nn.Module) -> nn.Module:
    """Convert all masks to those of `torch.nn.utils.prune`, for tools that expect them.

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
        for module, name in parameter.holders:
            prune.custom_from_mask(module, name, mask)
    return model
