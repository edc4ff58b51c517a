"""Layers seen as matrices: what each class of layer multiplies, by what, and its replacement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.operators import FactorProduct
from matfact.torch.conv import FactorizedConv, pad, unfold
from matfact.torch.layers import FactorizedLinear

#: Statistics of the inputs of a layer, one for each of its matrices: of the inputs alone, or
#: together with what they are in the dense network.
LayerStatistics = list[InputStatistics] | list[OutputStatistics]


class Matricized(ABC):
    """A layer as one matrix, or as one for each of its groups.

    Parameters
    ----------
    layer : torch.nn.Module
        The layer, which is left as it is.
    """

    #: Whether rows of its inputs are what it multiplies, whatever the layer.
    by_rows: ClassVar[bool] = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """Return the matrices, of shape (outputs, inputs)."""

    @abstractmethod
    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        """Return the layer with `products`, copied or not, in place of the matrices."""

    @abstractmethod
    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Yield what a layer input `x` multiplies: (n, inputs) for each matrix, in pieces."""

    def arrays(self) -> list[Array]:
        """Return the matrices for the solvers: NumPy arrays on the CPU, tensors elsewhere."""
        return [as_array(matrix) for matrix in self.matrices()]

    def update(self, statistics: LayerStatistics, x: Tensor, *dense: Tensor) -> None:
        """Add the layer input `x` to `statistics`, beside that in the dense network for pairs."""
        for pieces in zip(*(self._inputs(each.detach()) for each in (x, *dense)), strict=True):
            for running, *arrays in zip(statistics, *pieces, strict=True):
                running.update(*map(as_array, arrays))


class MatricizedLinear(Matricized):
    """A linear layer, dense or factorized: ``weight`` is the matrix."""

    by_rows = True

    def matrices(self) -> list[Tensor]:
        return [self.layer.weight.detach()]

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedLinear(products[0], self.layer.bias, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        yield [x.reshape(-1, x.shape[-1])]


class MatricizedTransposed(MatricizedLinear):
    """A linear layer that keeps its weight transposed, as the GPT-2 of `transformers` does."""

    def matrices(self) -> list[Tensor]:
        return [self.layer.weight.detach().T]


class MatricizedConv(Matricized):
    """A convolution: the kernel of each group, flattened to (out, in · kernel size)."""

    def matrices(self) -> list[Tensor]:
        weight = self.layer.weight.detach()
        return list(weight.flatten(1).chunk(self.layer.groups))

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedConv.from_products(self.layer, products, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        conv = self.layer
        batch = x if x.ndim == len(conv.kernel_size) + 2 else x[None]
        for sample in batch.split(1):  # patches of one image at a time, to bound the memory
            patches = unfold(pad(sample, conv), conv.kernel_size, conv.stride, conv.dilation)
            yield list(patches[0].chunk(conv.groups, dim=1))


def matricized(layer: nn.Module) -> Matricized | None:
    """Return `layer` as matrices, or None if it is of a class that has none."""
    if isinstance(layer, (nn.Linear, FactorizedLinear)):
        return MatricizedLinear(layer)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, FactorizedConv)):
        return MatricizedConv(layer)
    if hasattr(layer, "nf") and any(c.__name__ == "Conv1D" for c in type(layer).__mro__):
        return MatricizedTransposed(layer)
    return None


def distinct_layers(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Return each module that is not inside a layer, with all of its names."""
    names: dict[nn.Module, list[str]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[0] in inside:
            inside.add(name)
        elif name:  # the network itself cannot be replaced in itself
            names.setdefault(module, []).append(name)
            if matricized(module) is not None:
                inside.add(name)
    return [(found, module) for module, found in names.items()]


def other_matrices(model: nn.Module) -> list[str]:
    """Return the parameters of two or more axes that are in no layer seen as matrices.

    Embeddings are among them, and the joint projection of queries, keys and values in
    :class:`torch.nn.MultiheadAttention`.
    """
    layers = [module for _, module in distinct_layers(model) if matricized(module) is not None]
    seen = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in seen]


def replace(
    model: nn.Module,
    names: Sequence[str],
    view: Matricized,
    products: Sequence[FactorProduct],
    shifts: Sequence[Array] = (),
    *,
    copy: bool = True,
) -> None:
    """Put `products` in place of the layer that `model` has under each of `names`.

    The `shifts`, one for each product if there are any, are added to its bias. Values
    are copied, or shared with the products.
    """
    old: Any = view.layer
    new: Any = view.replacement(products, copy)
    device = None if old.weight.is_meta else old.weight.device  # which weights without storage lack
    new.to(device=device, dtype=old.weight.dtype).train(old.training)
    if shifts:
        with torch.no_grad():
            new.bias += torch.cat([torch.as_tensor(shift) for shift in shifts]).to(new.bias)
    for name in names:
        model.set_submodule(name, new)


def as_array(tensor: Tensor) -> Array:
    """Return `tensor` as the solvers take it; on the CPU they are fastest on NumPy arrays."""
    return backend.to_numpy(tensor) if tensor.device.type == "cpu" else tensor.detach()
