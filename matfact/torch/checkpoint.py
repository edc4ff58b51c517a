"""Networks of factorized layers on disk, in the format of :mod:`matfact.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from matfact.checkpoint import Checkpoint, save
from matfact.operators import FactorProduct
from matfact.torch._matrices import (
    Matricized,
    MatricizedTransposed,
    distinct_layers,
    matricized,
    replace,
)
from matfact.torch.conv import FactorizedConv
from matfact.torch.layers import FactorizedLinear

#: In the settings of checkpoints whose products are laid out (out, in), whatever the layer.
_BY_LAYER = {"layout": "out, in"}


def save_network(
    model: nn.Module, path: str | Path, *, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a network, its factorized layers as factors, to a folder.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Parameters that several modules share are written once.
    path : str or Path
        The folder, which must not exist or be empty. All of it is written or nothing.
    settings : mapping, optional
        How the network was made; anything that JSON can hold.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    """
    products: dict[str, FactorProduct] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    inside: list[str] = []
    for (name, *_), layer in distinct_layers(model):
        if isinstance(layer, FactorizedLinear):
            products[f"{name}.weight"] = layer.to_product()
            inside.append(f"{name}.factors.")
        elif isinstance(layer, FactorizedConv):
            names = _kernel_names(name, layer.groups)
            products |= dict(zip(names, layer.to_products(), strict=True))
            inside.append(f"{name}.kernels.")
            if layer.groups == 1:
                kernel = (layer.in_channels, *map(int, layer.kernel_size))
                shapes[names[0]] = (layer.out_channels, *kernel)
    arrays = {name: tensor for name, tensor in _unshared(model) if not _begins(name, inside)}
    save(path, products | arrays, shapes=shapes, settings=dict(settings or {}) | _BY_LAYER)


def load_network(
    model: nn.Module | Callable[[], nn.Module], path: str | Path, *, strict: bool = True
) -> nn.Module:
    """Load a checkpoint into a network of the same architecture.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network, before or after it was compressed, with any weights. Its layers are replaced
        by factorized ones in place; it keeps its devices and dtypes. Or a function that builds it,
        which is faster and takes less memory: dense weights are never there, and what the
        checkpoint holds as it is stays in the file until it is used or written to.
    path : str or Path
        A folder written by :func:`save_network` or by ``matfact compress``.
    strict : bool, default=True
        Whether the checkpoint must hold every tensor of the network and no other, as for
        ``load_state_dict``.

    Returns
    -------
    torch.nn.Module
        The same `model`, or the one built.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If the checkpoint is damaged, or is not of this architecture.
    """
    network = Checkpoint(path)
    with network.mapping_ahead():
        model = model if isinstance(model, nn.Module) else _built(model)
        found = list(_replacements(model, network))
        used = {key for replacement in found for key in replacement.keys}
        rest = {name: _tensor(network, name) for name in network if name not in used}
    own = model.state_dict(keep_vars=True)
    if strict:
        _check_names(own, rest, [name for replacement in found for name in replacement.names])
    _check_sizes(own, rest)
    for replacement in found:
        replace(model, replacement.names, replacement.view, replacement.products, copy=False)
    rest = _without_assigned(model, rest)
    if rest:
        model.load_state_dict(rest, strict=False)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    _raise_if("lacks", missing)
    return model


def _built(build: Callable[[], nn.Module]) -> nn.Module:
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


def _without_assigned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


class _Replacement(NamedTuple):
    """A layer, by all its names, and the products stored for it under `keys`."""

    names: list[str]
    keys: list[str]
    view: Matricized
    products: list[FactorProduct]


def _replacements(model: nn.Module, network: Checkpoint) -> Iterator[_Replacement]:
    """Yield the layers of which the checkpoint holds factors."""
    is_by_layer = network.settings.get("layout") == _BY_LAYER["layout"]
    for names, layer in distinct_layers(model):
        view = matricized(layer)
        for name in names if view is not None else ():
            keys = _kernel_names(name, getattr(layer, "groups", 1))
            if not all(key in network and network.tensors[key].is_product for key in keys):
                continue
            products = [network.product(key, mapped=True) for key in keys]
            if isinstance(view, MatricizedTransposed) and not is_by_layer:
                products = [product.T for product in products]
            assert view is not None
            _check_shapes(keys[0], view, products)
            yield _Replacement(names, keys, view, products)
            break


def _kernel_names(name: str, groups: int) -> list[str]:
    """Return the names under which a layer's products are stored, one for each group."""
    if groups == 1:
        return [f"{name}.weight"]
    return [f"{name}.kernels.{i}.weight" for i in range(groups)]


def _unshared(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the state, each once."""
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in seen or not tensor.numel():
            seen.add(place)
            yield name, tensor


def _begins(name: str, prefixes: list[str]) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes)


def _tensor(network: Checkpoint, name: str) -> Tensor:
    """Return a tensor of the state; factors of what is no layer are multiplied."""
    if network.tensors[name].is_product:
        dense = torch.from_numpy(network.product(name).toarray())
        return dense.reshape(network.tensors[name].spec.shape)
    return torch.from_numpy(network.file(name).mapped(name))


def _check_shapes(name: str, view: Matricized, products: list[FactorProduct]) -> None:
    for matrix, product in zip(view.matrices(), products, strict=True):
        if tuple(matrix.shape) != product.shape:
            raise ValueError(
                f"path must name a checkpoint of this network, but {name!r} has shape "
                f"{product.shape} there and {tuple(matrix.shape)} here."
            )


def _check_names(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], replaced: list[str]
) -> None:
    """Raise ``ValueError`` unless `state` and what is replaced make up all of the model's `own`."""
    loaded = {_place(own[name]) for name in state if name in own}
    inside = tuple(f"{name}." for name in replaced)
    missing = [
        name
        for name, tensor in own.items()
        if name not in state
        and _place(tensor) not in loaded
        and (not name.startswith(inside) or name.endswith(".bias"))
    ]
    _raise_if("lacks", missing)
    _raise_if("also has", [name for name in state if name not in own])


def _raise_if(what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise ValueError(f"path must name a checkpoint of this network, but it {what} {shown}.")


def _place(tensor: Tensor) -> int:
    """Return what tells tensors apart that share no memory."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def _check_sizes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name in own and tensor.shape != own[name].shape:
            raise ValueError(
                f"path must name a checkpoint of this network, but {name!r} has shape "
                f"{tuple(tensor.shape)} there and {tuple(own[name].shape)} here."
            )
