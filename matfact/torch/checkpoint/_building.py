"""Building a network without memory for the weights that it is about to be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` makes, its parameters without storage, as they are to be loaded."""

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
    """Leaves out the initialization of tensors without storage: it takes most of building."""

    _NAMES = frozenset(
        {"normal_", "uniform_"} | {name for name in dir(nn.init) if name[0] != "_" == name[-1]}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # By name, since functions of nn.init may have been replaced by others that call them.
        if getattr(func, "__name__", "") in self._NAMES:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


def without_assigned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give parameters without storage what `state` holds, and return the rest of it."""
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
