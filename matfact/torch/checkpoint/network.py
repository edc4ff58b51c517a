"""Saving and loading of factorized networks, in the format of `matfact.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from matfact._layers import matrix_shape
from matfact.checkpoint import Checkpoint, save
from matfact.operators import FactorProduct
from matfact.report import CompressionReport
from matfact.torch._attached import attached
from matfact.torch.checkpoint._building import built, without_assigned
from matfact.torch.checkpoint._masked import joined, mask_names, masked_tensors, stored_product
from matfact.torch.checkpoint._state import (
    State,
    check_dtype,
    misfit,
    place,
    raise_if,
    stored_tensor,
)
from matfact.torch.layers._matricized import (
    Matricized,
    MatricizedTransposed,
    distinct_layers,
    matricized,
    replace,
)
from matfact.torch.layers._narrowed import narrowed, narrowed_tensors, parsed
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._offloaded import fetched
from matfact.torch.running._tensors import outside_inference_mode

#: Setting of checkpoints with all products in the layout (out, in).
_BY_LAYER = {"layout": "out, in"}


def save_network(
    model: nn.Module,
    path: str | Path,
    *,
    report: CompressionReport | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Save a network to a folder, with factorized layers stored as factors.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Shared parameters are written once, and masked weights without masked values.
    path : str or Path
        The folder, which must be new or empty. It is written completely or not at all.
    report : CompressionReport, optional
        Report of `compress`, available later as
        ``matfact.checkpoint.Checkpoint(path).report``.
    settings : mapping, optional
        How the network was made; any values that JSON can represent.

    Raises
    ------
    FileExistsError
        If `path` exists and is not an empty folder.
    ValueError
        If a tensor is on the meta device and not offloaded by accelerate, or the report is of
        another network.
    """
    if report is not None:
        report.check_fits(name for name, _ in model.named_modules(remove_duplicate=False))
    with fetched(model):
        _save(model, path, report, settings)


def _save(
    model: nn.Module,
    path: str | Path,
    report: CompressionReport | None,
    settings: Mapping[str, Any] | None,
) -> None:
    """Save a network with its tensors in memory."""
    absent = next((name for name, each in model.state_dict().items() if each.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"model must hold its values, but {absent!r} is on the meta device: never loaded."
        )
    content: dict[str, FactorProduct | Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    inside: list[str] = []
    for name, layer, products in factorized_layers(model):
        keys = _kernel_names(name, getattr(layer, "groups", 1))
        content |= dict(zip(keys, products, strict=True))
        inside.append(joined(name, held_in(layer)))
        if isinstance(layer, FactorizedConv) and layer.groups == 1:
            kernel = (layer.in_channels, *map(int, layer.kernel_size))
            shapes[keys[0]] = (layer.out_channels, *kernel)
    for name, masked in masked_tensors(model).items():
        content[name], shapes[name] = masked
    content |= _unshared(model, tuple(inside), mask_names(model))
    record = narrowed_tensors(model)
    narrowing = {"narrowed": record} if record else {}
    known = dict(settings or {}) | _BY_LAYER | narrowing
    save(path, content, shapes=shapes, report=report, settings=known)


def factorized_layers(
    model: nn.Module,
) -> Iterator[tuple[str, FactorizedLinear | FactorizedConv, list[FactorProduct]]]:
    """Yield the factorized layers of a network: first name, layer, and a product per group."""
    for (name, *_), layer in distinct_layers(model):
        if isinstance(layer, (FactorizedLinear, FactorizedConv)):
            kernels = [layer] if isinstance(layer, FactorizedLinear) else list(layer.kernels)
            with fetched(layer):
                chains = [kernel.chain for kernel in cast(list[FactorizedLinear], kernels)]
                yield name, layer, [stored_product(chain) for chain in chains]


def held_in(layer: FactorizedLinear | FactorizedConv) -> str:
    """Return what the names of the factors in a layer begin with."""
    return "factors." if isinstance(layer, FactorizedLinear) else "kernels."


@outside_inference_mode
def load_network(
    model: nn.Module | Callable[[], nn.Module], path: str | Path, *, strict: bool = True
) -> nn.Module:
    """Load a checkpoint into a network of the same architecture.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network, before or after compression, with any weights. Its layers are replaced in place
        by factorized ones; devices and dtypes are kept. Alternatively a function that builds the
        network, which is faster and takes less memory, since dense weights are never allocated.
        Values are copied, so the files may be removed afterwards.
    path : str or Path
        A folder written by `save_network` or by ``matfact compress``.
    strict : bool, default=True
        Whether the checkpoint must hold exactly the tensors of the network, as in
        ``load_state_dict``. One name is enough for shared tensors, and extra tensors may match
        buffers that the network creates with the same values.

    Returns
    -------
    torch.nn.Module
        `model`, or the network built. Layers pruned by masks have sparse factors. Layers pruned by
        `prune_neurons` are narrower; no other layer is resized.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If the checkpoint is damaged or of another architecture, or if the network's dtype cannot
        represent a tensor; float16, bfloat16 and float32 are interchangeable.
    """
    network = Checkpoint(path)
    with network.reading_ahead():
        model = model if isinstance(model, nn.Module) else built(model)
        with narrowed(model, parsed(network.settings.get("narrowed"))):
            _load(model, network, strict)
    return attached(model)


def _load(model: nn.Module, network: Checkpoint, strict: bool) -> None:
    """Load a checkpoint into a network with layers of the same widths."""
    fitting = list(_replacements(model, network))
    state = State(model, network, [name for replacement in fitting for name in replacement.names])
    used = {key for replacement in fitting for key in replacement.keys}
    names = state.checked([name for name in network if name not in used], strict)
    found = [replacement.loaded(network) for replacement in fitting]  # after all checks
    tensors = {name: stored_tensor(network, name) for name in names}
    weights = {joined(name, "weight"): r.weight for r in found for name in r.names}
    state.check_shared(tensors, weights)
    tensors |= state.tied(tensors, weights)
    for replacement in found:
        replace(model, replacement.names, replacement.view, replacement.products, copy=False)
    state.unmask(tensors)
    tensors = without_assigned(model, tensors)
    if tensors:
        model.load_state_dict(tensors, strict=False)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    raise_if("lacks", missing)


class _Replacement(NamedTuple):
    """A layer with all its names, and its products stored under `keys`."""

    names: list[str]
    keys: list[str]
    view: Matricized
    products: list[FactorProduct]

    def loaded(self, network: Checkpoint) -> _Replacement:
        """Load the products."""
        products = [network.product(key) for key in self.keys]
        if _is_turned(network, self.view):
            products = [product.T for product in products]
        return self._replace(products=products)

    def weight(self) -> Tensor:
        """Return the dense weight."""
        dense = torch.cat([torch.from_numpy(product.toarray()) for product in self.products])
        dense = dense.T if isinstance(self.view, MatricizedTransposed) else dense
        return dense.reshape(self.view.layer.weight.shape)


def _replacements(model: nn.Module, network: Checkpoint) -> Iterator[_Replacement]:
    """Yield the layers with factors in the checkpoint."""
    for names, layer in distinct_layers(model):
        view = matricized(layer)
        for name in names if view is not None else ():
            keys = _kernel_names(name, getattr(layer, "groups", 1))
            if not all(key in network and network.tensors[key].is_product for key in keys):
                continue
            assert view is not None
            _check(network, keys, view)
            yield _Replacement(names, keys, view, [])
            break


def _check(network: Checkpoint, keys: Sequence[str], view: Matricized) -> None:
    """Raise ``ValueError`` if the products of a layer have another shape or dtype."""
    for key, matrix in zip(keys, view.matrices(), strict=True):
        there = network.tensors[key].spec.shape
        there = matrix_shape(there) if len(there) > 1 else there
        there = there[::-1] if _is_turned(network, view) else there
        if there != tuple(matrix.shape):
            raise misfit(key, there, matrix.shape)
        check_dtype(network, key, view.layer.weight.dtype)


def _is_turned(network: Checkpoint, view: Matricized) -> bool:
    """Whether the stored products of a layer are transposed, like its weight."""
    is_by_layer = network.settings.get("layout") == _BY_LAYER["layout"]
    return isinstance(view, MatricizedTransposed) and not is_by_layer


def _kernel_names(name: str, groups: int) -> list[str]:
    """Return the names of a layer's stored products, one per group."""
    if groups == 1:
        return [joined(name, "weight")]
    return [joined(name, f"kernels.{i}.weight") for i in range(groups)]


def _unshared(
    model: nn.Module, inside: tuple[str, ...], masks: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors of the state outside of factors and masked parameters, each once."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in masks:
            found.setdefault(place(tensor), (name, tensor))
    return {name: tensor for name, tensor in found.values() if not name.startswith(inside)}
