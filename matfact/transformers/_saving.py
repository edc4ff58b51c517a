"""What ``save_pretrained`` writes of a compressed network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matfact.checkpoint._packed import described, packed
from matfact.torch.checkpoint._masked import joined
from matfact.torch.checkpoint.network import factorized_layers, held_in


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a network with packed layers, and the description of these."""
    content: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    inside = []
    for name, layer, products in factorized_layers(model):
        own = packed(products)
        factors, counts = described(own, name), [len(product.factors) for product in products]
        layers[name] = {
            "factors": [[factors.pop(0) for _ in range(n)] for n in counts],
            "nbytes": own.size,
        }
        content[joined(name, "weight")] = torch.from_numpy(own)
        inside.append(joined(name, held_in(layer)))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(inside))}
    return state | content, layers


def check_refused(dense: nn.Module, layers: Collection[str]) -> None:
    """Raise ``ValueError`` if programs without matfact would load random weights.

    They refuse a tensor of another shape than in the `dense` network of the architecture.
    """
    names = dense.state_dict().keys()
    if layers and not any(joined(layer, "weight") in names for layer in layers):
        raise ValueError(
            f"model must have a factorized layer with a weight of its own, else programs without "
            f"matfact would load random weights, but all compute theirs: {min(layers)!r}. Use "
            "save_network."
        )


def check_reloads(model: nn.Module, state: Mapping[str, Tensor], rebuilt: nn.Module) -> None:
    """Raise ``ValueError`` if a network that is `rebuilt` from its configuration differs."""
    here = {name: tuple(tensor.shape) for name, tensor in state.items()}
    there = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{type(model).__name__} must be what its configuration describes, else it cannot "
                f"be loaded again, but {name!r} has shape {here.get(name)} here and "
                f"{there.get(name)} in a network built from the configuration."
            )
