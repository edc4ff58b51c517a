"""What ``save_pretrained`` writes of a compressed network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matfact.checkpoint._packed import described, packed, unpacked
from matfact.operators import FactorProduct
from matfact.torch.checkpoint._masked import joined
from matfact.torch.checkpoint.network import factorized_layers, held_in
from matfact.torch.layers._matricized import distinct_layers, matricized
from matfact.torch.layers._pretrained import saved_now
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear


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


def check_given(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``save_pretrained`` was given values that `model` does not have.

    `transformers` drops a state dict that it is given for a network with a quantizer.
    """
    given = saved_now().get("state_dict")
    own = {} if given is None else model.state_dict()
    for name, value in (given or {}).items():
        kept = own.get(name)
        if not isinstance(value, Tensor) or value.is_meta or (kept is not None and kept.is_meta):
            continue
        is_typed = kept is not None and value.dtype == kept.dtype
        if kept is None or not is_typed or not torch.equal(value.to(kept.device), kept):
            raise ValueError(
                f"state_dict must hold the values of the network, else they would not be saved, "
                f"but {name!r} differs: load it into the network before saving."
            )


def expand_packed(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Replace packed layers in a state dict to load by their factors, as a hook of `model`.

    ``Trainer`` loads its checkpoints without ``from_pretrained``.
    """
    for (name, *_), layer in distinct_layers(model):
        key = prefix + joined(name, "weight")
        content = state.get(key)
        is_packed = isinstance(content, Tensor) and content.dtype == torch.uint8
        if is_packed and isinstance(layer, (FactorizedLinear, FactorizedConv)):
            view: Any = matricized(layer)
            products = _products(state.pop(key).numpy(force=True), key, len(view.matrices()))
            own = view.replacement(products, copy=False).state_dict()
            if own.keys() != layer.state_dict().keys():
                raise ValueError(f"{key} must hold factors like those of the network's layer.")
            state.update({prefix + joined(name, k): v for k, v in own.items() if k != "bias"})


def _products(content: np.ndarray, name: str, n: int) -> list[FactorProduct]:
    """Return `n` products with as many factors each from a packed layer."""
    factors = described(content, name)
    step = max(1, len(factors) // n)
    parts = [factors[i : i + step] for i in range(0, len(factors), step)]
    return unpacked(content, name, parts)


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
