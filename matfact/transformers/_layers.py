"""Layers whose factors are still packed, as they are while a repository is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from matfact._text import printable
from matfact.checkpoint._packed import unpacked
from matfact.torch.layers._matricized import Matricized, distinct_layers, matricized, replace
from matfact.transformers._config import product_shape

#: Bytes of memory that a factor takes in modules for each stored value besides the value itself.
_POSITION = 2


class PackedLayer(nn.Module):
    """Stands for a factorized layer until its tensor of bytes is read.

    The tensor has the name of the dense weight and another shape, so that readers that do not know
    this method refuse it.

    Parameters
    ----------
    view : Matricized
        View of the layer of the architecture, on the meta device.
    entry : mapping
        The layer in :attr:`MatfactConfig.layers`.
    """

    weight: nn.Parameter

    def __init__(self, view: Matricized, entry: dict[str, Any]) -> None:
        super().__init__()
        content = torch.empty(entry["nbytes"], dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(content, requires_grad=False)
        self.bias = view.layer.bias
        self.view, self.entry = (view,), entry  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """Return what architectures read while they initialize, such as ``in_features``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "view" not in vars(self):
                raise
            return getattr(self.view[0].layer, name)

    def memory(self, itemsize: int) -> int:
        """Return about how many bytes the layer will take."""
        return sum(_memory(factor, itemsize) for p in self.entry["factors"] for factor in p)


def _memory(factor: dict[str, Any], itemsize: int) -> int:
    rows, columns = factor["shape"]
    mask = (rows * columns + 7) // 8
    values = factor["values"] * (1 if "bits" in factor else itemsize)
    if factor["kind"] in ("csr", "bitmask", "gaps"):
        return values + mask + _POSITION * factor["values"]
    return mask if factor["kind"] == "sign" else values


def pack(model: nn.Module, layers: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    """Replace layers of a network on the meta device by packed ones.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    layers : dict
        Entries of :attr:`MatfactConfig.layers`.
    names : dict of str to str
        The names in the network of those layers that it has.

    Raises
    ------
    ValueError
        If a layer has another shape, or is no linear layer or convolution.
    """
    found = {name: (all_, layer) for all_, layer in distinct_layers(model) for name in all_}
    for name, own in names.items():
        if own not in found or (view := matricized(found[own][1])) is None:
            raise ValueError(
                f"config.json must name linear layers and convolutions, but {printable(name)!r} "
                f"is none in {type(model).__name__}."
            )
        here = [tuple(matrix.shape) for matrix in view.matrices()]
        there = [product_shape(product) for product in layers[name]["factors"]]
        if here != there:
            raise ValueError(
                f"config.json must describe this architecture, but {printable(name)!r} has "
                f"{len(there)} products of shape {there[0]} there, and {len(here)} of {here[0]} "
                f"in {type(model).__name__}."
            )
        packed = PackedLayer(view, layers[name])
        for each in found[own][0]:
            model.set_submodule(each, packed)


def unpack(model: nn.Module) -> None:
    """Replace the packed layers of a loaded network by factorized ones, one after the other.

    Raises
    ------
    ValueError
        If a tensor is missing or damaged.
    """
    for names, layer in list(_packed(model)):
        own = f"{names[0]}.weight"
        if not getattr(layer.weight, "_is_hf_initialized", False):
            raise ValueError(f"The repository lacks {own}, a factorized layer in config.json.")
        (view,), device = layer.view, layer.weight.device
        if layer.weight.is_floating_point():  # as early releases say which layers to keep so
            view.layer.to(layer.weight.dtype)
        content = layer.weight.to("cpu", torch.uint8).numpy(force=True)
        products = unpacked(content, own, layer.entry["factors"])
        view.layer.train(layer.training).bias = layer.bias
        if "_hf_hook" in vars(layer):
            vars(view.layer)["_hf_hook"] = layer._hf_hook
        layer.weight = None  # type: ignore[assignment]
        replace(model, names, view, products, copy=False)
        model.get_submodule(names[0]).to(device)


def _packed(model: nn.Module) -> Iterator[tuple[list[str], PackedLayer]]:
    names: dict[PackedLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            names.setdefault(module, []).append(name)
    yield from ((found, layer) for layer, found in names.items())
