"""Building a network without allocating weights that are loaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the result of `build`, with parameters on the meta device."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    registration = register_module_parameter_registration_hook(cast(Any, emptied))
    try:
        with _Undrawn():
            return build()
    finally:
        registration.remove()


class _Undrawn(TorchFunctionMode):
    """Skips the initialization of meta tensors, which takes most of the time."""

    _NAMES = frozenset(
        {"normal_", "uniform_"} | {name for name in dir(nn.init) if name[0] != "_" == name[-1]}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # By name, since functions of nn.init may have been wrapped.
        if getattr(func, "__name__", "") in self._NAMES:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def without_assigned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Assign entries of `state` to meta parameters, and return the other entries."""
    empty = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_meta
    }
    filled = {
        parameter: nn.Parameter(state[name].to(parameter.dtype), parameter.requires_grad)
        for name, parameter in empty.items()
        if name in state
    }
    for name, parameter in empty.items():
        if parameter in filled:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, filled[parameter])
    return {name: tensor for name, tensor in state.items() if name not in empty}
