"""Networks of factorized layers on disk, in the format of :mod:`matfact.checkpoint`."""

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
from matfact.torch.running._tensors import outside_inference_mode

#: In the settings of checkpoints whose products are laid out (out, in), whatever the layer.
_BY_LAYER = {"layout": "out, in"}


def save_network(
    model: nn.Module,
    path: str | Path,
    *,
    report: CompressionReport | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, its factorized layers as factors, to a folder.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Parameters that several modules share are written once, and of masked weights
        only what their masks leave.
    path : str or Path
        The folder, which must not exist or be empty. All of it is written or nothing.
    report : CompressionReport, optional
        What :func:`compress` said of it. ``matfact.checkpoint.Checkpoint(path).report`` tells it
        again.
    settings : mapping, optional
        How the network was made; anything that JSON can hold.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    """
    content: dict[str, FactorProduct | Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    inside: list[str] = []
    for (name, *_), layer in distinct_layers(model):
        if isinstance(layer, FactorizedLinear):
            content[joined(name, "weight")] = stored_product(layer.chain)
            inside.append(joined(name, "factors."))
        elif isinstance(layer, FactorizedConv):
            names = _kernel_names(name, layer.groups)
            products = [stored_product(kernel.chain) for kernel in _linears(layer)]
            content |= dict(zip(names, products, strict=True))
            inside.append(joined(name, "kernels."))
            if layer.groups == 1:
                kernel = (layer.in_channels, *map(int, layer.kernel_size))
                shapes[names[0]] = (layer.out_channels, *kernel)
    for name, masked in masked_tensors(model).items():
        content[name], shapes[name] = masked
    content |= _unshared(model, tuple(inside), mask_names(model))
    record = narrowed_tensors(model)
    narrowing = {"narrowed": record} if record else {}
    known = dict(settings or {}) | _BY_LAYER | narrowing
    save(path, content, shapes=shapes, report=report, settings=known)


@outside_inference_mode
def load_network(
    model: nn.Module | Callable[[], nn.Module], path: str | Path, *, strict: bool = True
) -> nn.Module:
    """Load a checkpoint into a network of the same architecture.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network, before or after it was compressed, with any weights. Its layers are replaced
        by factorized ones in place; it keeps its devices and dtypes. Or a function that builds it,
        which is faster and takes less memory: dense weights are never there. Either way the
        values are in memory of the network's own, whatever becomes of the files.
    path : str or Path
        A folder written by :func:`save_network` or by ``matfact compress``.
    strict : bool, default=True
        Whether the checkpoint must hold every tensor of the network and no other, as for
        ``load_state_dict``. Of tensors that the network shares one name is enough, and buffers
        that it makes itself, with the same values, may be there.

    Returns
    -------
    torch.nn.Module
        The same `model`, or the one built. Layers pruned by a mask have sparse factors, those from
        which :func:`prune_neurons` has removed units are narrower; no other layer is resized.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If the checkpoint is damaged, or is not of this architecture, or if the network has a
        dtype that cannot hold the numbers of a tensor; float16, bfloat16 and float32 stand for
        one another.
    """
    network = Checkpoint(path)
    with network.reading_ahead():
        model = model if isinstance(model, nn.Module) else built(model)
        with narrowed(model, parsed(network.settings.get("narrowed"))):
            _load(model, network, strict)
    return model


def _load(model: nn.Module, network: Checkpoint, strict: bool) -> None:
    """Load a checkpoint into a network with layers of the same widths."""
    fitting = list(_replacements(model, network))
    state = State(model, network, [name for replacement in fitting for name in replacement.names])
    used = {key for replacement in fitting for key in replacement.keys}
    names = state.checked([name for name in network if name not in used], strict)
    found = [replacement.loaded(network) for replacement in fitting]  # now that all of it fits
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
    """A layer, by all its names, and the products stored for it under `keys`, once loaded."""

    names: list[str]
    keys: list[str]
    view: Matricized
    products: list[FactorProduct]

    def loaded(self, network: Checkpoint) -> _Replacement:
        """Return it with its products."""
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
    """Yield the layers of which the checkpoint holds factors."""
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
    """Raise ``ValueError`` where the products of a layer are not of its shape and dtype."""
    for key, matrix in zip(keys, view.matrices(), strict=True):
        there = network.tensors[key].spec.shape
        there = matrix_shape(there) if len(there) > 1 else there
        there = there[::-1] if _is_turned(network, view) else there
        if there != tuple(matrix.shape):
            raise misfit(key, there, matrix.shape)
        check_dtype(network, key, view.layer.weight.dtype)


def _is_turned(network: Checkpoint, view: Matricized) -> bool:
    """Whether the products of a layer are laid out as the transposed weight that it keeps."""
    is_by_layer = network.settings.get("layout") == _BY_LAYER["layout"]
    return isinstance(view, MatricizedTransposed) and not is_by_layer


def _kernel_names(name: str, groups: int) -> list[str]:
    """Return the names under which a layer's products are stored, one for each group."""
    if groups == 1:
        return [joined(name, "weight")]
    return [joined(name, f"kernels.{i}.weight") for i in range(groups)]


def _linears(conv: FactorizedConv) -> list[FactorizedLinear]:
    return cast(list[FactorizedLinear], list(conv.kernels))


def _unshared(
    model: nn.Module, inside: tuple[str, ...], masks: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors of the state that are in no factors and no masked ones, each once."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in masks:
            found.setdefault(place(tensor), (name, tensor))
    return {name: tensor for name, tensor in found.values() if not name.startswith(inside)}
