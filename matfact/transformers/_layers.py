"""Layers whose factors are still packed, as they are while a repository is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matfact._layers import matrix_shape
from matfact._text import printable
from matfact.checkpoint._packed import unpacked
from matfact.operators import FactorProduct
from matfact.torch.layers._matricized import (
    MatricizedTransposed,
    distinct_layers,
    matricized,
    replace,
)
from matfact.torch.running._offloaded import (
    HOOK,
    fetched,
    hook_in_memory,
    is_offloaded,
    used_on,
)
from matfact.transformers._config import MatfactConfig, product_shape

#: Bytes of memory that a factor takes in modules for each stored value besides the value itself.
_POSITION = 2
#: Mark of transformers on tensors that need no random numbers.
_LOADED = "_is_hf_initialized"


class PackedLayer(nn.Module):
    """Stands for a factorized layer until its tensor of bytes is read.

    The tensor has the name of the dense weight and another shape, so that readers that do not know
    this method refuse it.

    Parameters
    ----------
    layer : torch.nn.Module
        The layer of the architecture, on the meta device.
    entry : mapping
        The layer in `MatfactConfig.layers`.
    is_stored : bool
        Whether products are of the weight as the layer stores it, not of its matrices.
    """

    weight: nn.Parameter

    def __init__(self, layer: Any, entry: dict[str, Any], is_stored: bool) -> None:
        super().__init__()
        content = torch.empty(entry["nbytes"], dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(content, requires_grad=False)
        setattr(self.weight, _LOADED, True)  # not to be drawn; lost if it is missing in files
        self.bias = getattr(layer, "bias", None)
        view = matricized(layer)
        self.entry, self.is_stored = entry, is_stored
        self.is_turned = is_stored and isinstance(view, MatricizedTransposed)
        self.held = layer, view  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """Return what architectures read while they initialize, such as ``in_features``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "held" not in vars(self):
                raise
            return getattr(self.held[0], name)

    def misfit(self) -> str | None:
        """Return how the products differ from what the layer takes, or None."""
        layer, view = self.held
        there = [product_shape(product) for product in self.entry["factors"]]
        there = [shape[::-1] for shape in there] if self.is_turned else there
        fitting = [] if view is None else [[tuple(matrix.shape) for matrix in view.matrices()]]
        if self.is_stored and not self.is_turned:
            fitting.append([matrix_shape(tuple(layer.weight.shape))])
        if not fitting:
            return "a product, and it is no linear layer or convolution"
        if there in fitting:
            return None
        (here, *rest), n = fitting[0], len(there)
        return f"{n} products of shape {there[0]} there, and {1 + len(rest)} of {here}"

    def memory(self, itemsize: int) -> int:
        """Return about how many bytes the layer will take."""
        return sum(_memory(factor, itemsize) for p in self.entry["factors"] for factor in p)

    def products(self, name: str) -> list[FactorProduct]:
        """Return the products, read from the tensor, which is called `name` in errors."""
        content = self.weight.to("cpu", torch.uint8).numpy(force=True)
        found = unpacked(content, name, self.entry["factors"])
        return [product.T for product in found] if self.is_turned else found


def _memory(factor: dict[str, Any], itemsize: int) -> int:
    rows, columns = factor["shape"]
    mask = (rows * columns + 7) // 8
    values = factor["values"] * (1 if "bits" in factor else itemsize)
    if factor["kind"] in ("csr", "bitmask", "gaps"):
        return values + mask + _POSITION * factor["values"]
    return mask if factor["kind"] == "sign" else values


def pack(model: nn.Module, config: MatfactConfig, names: Mapping[str, str]) -> None:
    """Replace layers of a network on the meta device by packed ones.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    config : MatfactConfig
        The structure of its layers.
    names : mapping of str to str
        The names in the network of those layers in `config` that it has.

    Raises
    ------
    ValueError
        If a layer has another shape, or cannot have factors.
    """
    found = {name: every for every, _ in distinct_layers(model) for name in every}
    for name, own in names.items():
        layer: Any = model.get_submodule(own)
        is_layer = isinstance(getattr(layer, "weight", None), Tensor) and own in found
        packed = PackedLayer(layer, config.layers[name], config.layout == "stored")
        if not is_layer or (misfit := packed.misfit()) is not None:
            problem = misfit if is_layer else "factors there, and no weight"
            raise ValueError(
                f"config.json must describe this architecture, but {printable(name)!r} has "
                f"{problem} in {type(model).__name__}."
            )
        for each in found[own]:
            model.set_submodule(each, packed)


def unpack(model: nn.Module) -> None:
    """Replace the packed layers of a loaded network by factorized ones, one after the other.

    Raises
    ------
    ValueError
        If a tensor is missing or damaged.
    """
    for names, layer in list(_packed(model)):
        is_away = is_offloaded(layer)
        if not (is_away or getattr(layer.weight, _LOADED, False)):
            raise ValueError(
                f"The repository lacks {names[0]}.weight, a factorized layer in config.json."
            )
        device = used_on(layer) if is_away else layer.weight.device
        with fetched(layer):
            _replace(model, names, layer)
        model.get_submodule(names[0]).to(device)
        if is_away:
            _offload(model.get_submodule(names[0]), names[0], vars(layer)[HOOK])


def _replace(model: nn.Module, names: Sequence[str], layer: PackedLayer) -> None:
    """Replace a packed layer whose tensors are in memory."""
    old, view = layer.held
    if layer.weight.is_floating_point():  # as early releases say which layers to keep so
        old.to(layer.weight.dtype)
    old.train(layer.training).bias = layer.bias
    if HOOK in vars(layer):
        vars(old)[HOOK] = hook_in_memory(vars(layer)[HOOK])
    products = layer.products(f"{names[0]}.weight")
    layer.weight = None  # type: ignore[assignment]
    if view is not None and len(products) == len(view.matrices()):
        replace(model, names, view, products, copy=False)
    else:  # computed in another way than by one product
        weight = torch.from_numpy(products[0].toarray()).reshape(old.weight.shape)
        old.weight = nn.Parameter(weight.to(old.weight.dtype))
        for name in names:
            model.set_submodule(name, old)


def _offload(layer: nn.Module, name: str, hook: Any) -> None:
    """Offload the factors of a layer to where its packed tensor was, on the host or on a disk."""
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
    from accelerate.utils import OffloadedWeightsLoader, offload_state_dict

    held = getattr(hook.weights_map, "dataset", hook.weights_map)
    folder, place = getattr(held, "save_folder", None), hook.execution_device
    values: Any = {key: tensor.cpu() for key, tensor in layer.state_dict().items()}
    if folder is not None and f"{name}.weight" not in getattr(held, "state_dict", {}):
        own = Path(folder) / f"{name}.factors"
        offload_state_dict(str(own), values)
        values = OffloadedWeightsLoader(save_folder=str(own))
    remove_hook_from_module(layer)  # which only moves inputs, as its successor does
    attach_align_device_hook(layer, execution_device=place, offload=True, weights_map=values)


def _packed(model: nn.Module) -> Iterator[tuple[list[str], PackedLayer]]:
    names: dict[PackedLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            names.setdefault(module, []).append(name)
    yield from ((found, layer) for layer, found in names.items())
