"""Layers seen as matrices: what each class of layer multiplies, by what, and its replacement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from matfact import backend
from matfact._layers import Weight, reason_to_keep
from matfact.backend import Array
from matfact.operators import FactorProduct
from matfact.torch.layers._inherit import inherit, is_moved_by_accelerate
from matfact.torch.layers._weights import effective, others
from matfact.torch.layers.conv import FactorizedConv, pad, unfold
from matfact.torch.layers.linear import FactorizedLinear


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

    @property
    def weight(self) -> Tensor:
        """The weight the layer computes with."""
        weight: Tensor = effective(self.layer, "weight")
        return weight.detach()

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


class MatricizedLinear(Matricized):
    """A linear layer, dense or factorized: ``weight`` is the matrix."""

    by_rows = True

    def matrices(self) -> list[Tensor]:
        return [self.weight]

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedLinear(products[0], self.layer.bias, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        yield [x.reshape(-1, x.shape[-1])]


class MatricizedTransposed(MatricizedLinear):
    """A linear layer that keeps its weight transposed, as the GPT-2 of `transformers` does."""

    def matrices(self) -> list[Tensor]:
        return [self.weight.T]


class MatricizedConv(Matricized):
    """A convolution: the kernel of each group, flattened to (out, in · kernel size)."""

    def matrices(self) -> list[Tensor]:
        return list(self.weight.flatten(1).chunk(self.layer.groups))

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedConv.from_products(self.layer, products, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        conv = self.layer
        batch = x if x.ndim == len(conv.kernel_size) + 2 else x[None]
        for sample in batch.split(1):  # patches of one image at a time, to bound the memory
            patches = unfold(pad(sample, conv), conv.kernel_size, conv.stride, conv.dilation)
            yield list(patches[0].chunk(conv.groups, dim=1))


#: Classes of linear maps, and those of them as matrices.
_VIEWS: dict[type, type[Matricized]] = {
    nn.Linear: MatricizedLinear,
    FactorizedLinear: MatricizedLinear,
    nn.Conv1d: MatricizedConv,
    nn.Conv2d: MatricizedConv,
    nn.Conv3d: MatricizedConv,
    FactorizedConv: MatricizedConv,
}
#: What makes a module compute what it does.
_METHODS = ("__call__", "_call_impl", "forward", "_conv_forward")
#: What is known of a layer that is factorized already.
_UNDOUBTED = Weight("float32", (1, 1))
_TENSORS = (Tensor, nn.Parameter, nn.UninitializedParameter)


def matricized(layer: nn.Module) -> Matricized | None:
    """Return `layer` as matrices, or None if it is no linear map that can be taken."""
    if refusal(layer) is not None:
        return None
    return _VIEWS.get(_family(layer), MatricizedTransposed)(layer)  # type: ignore[arg-type]


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is by its class a linear layer or a convolution, taken or not."""
    return _family(layer) is not None


def refusal(layer: nn.Module) -> str | None:
    """Return why `layer` is not taken as matrices, or None if it is.

    It is taken if it computes what its class in torch does, by a weight of a floating or complex
    dtype. What stands in the weight does not matter, not even whether it is in memory.
    """
    return reason_to_keep(facts(layer))


def facts(layer: nn.Module) -> Weight:
    """Return what is known of the weight of `layer`."""
    if odd := _odd_class(layer):
        return Weight("", (), odd=odd)
    if isinstance(layer, (FactorizedLinear, FactorizedConv)):
        return _UNDOUBTED
    weight = effective(layer, "weight")
    if odd := _odd_tensor(weight):
        return Weight("", (), odd=odd)
    known = Weight(str(weight.dtype).removeprefix("torch."), (1, 1), others=others(layer))
    if is_lazy(weight):  # its shape is yet to come
        return known
    bias, n_axes = effective(layer, "bias"), 2 + len(getattr(layer, "kernel_size", ()))
    return known._replace(
        shape=tuple(weight.shape),
        axes=(n_axes,),
        bias=None if bias is None else tuple(bias.shape),
    )


def _odd_class(layer: nn.Module) -> str | None:
    """Return how a layer computes something else than a linear layer or convolution of torch."""
    base = _family(layer)
    if base is None:
        return "no linear layer or convolution"
    if base not in _VIEWS and base.__module__.partition(".")[0] != "transformers":
        return "class that is not the Conv1D of transformers"
    changed = [name for name in _METHODS if _differs(layer, base, name)]
    return f"layer with a {changed[0]} of its own" if changed else None


def _family(layer: nn.Module) -> type | None:
    """Return the class of linear maps that `layer` comes from."""
    for base in type(layer).__mro__:
        if base in _VIEWS or (base.__name__ == "Conv1D" and hasattr(layer, "nf")):
            return base
    return None


def _differs(layer: nn.Module, base: type, name: str) -> bool:
    """Whether a method of `layer` is not that of the class it comes from."""
    own = getattr(type(layer), name, None) is getattr(base, name, None)
    if not own or name not in vars(layer):
        return not own
    takes_turns = getattr(
        vars(layer)[name], "takes_turns", False
    )  # of a calibration that is under way
    return not (takes_turns or is_moved_by_accelerate(layer))


def _odd_tensor(weight: Any) -> str | None:
    """Return what is odd about how a weight is stored, if anything."""
    if not isinstance(weight, Tensor):
        return "layer with no weight"
    if type(weight) not in _TENSORS:
        return f"weight of class {type(weight).__name__}"
    return None if weight.layout == torch.strided else f"weight of layout {weight.layout}"


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


def other_matrices(model: nn.Module) -> dict[str, float]:
    """Return the parameters of two or more axes that are in no linear layer or convolution.

    Embeddings are among them, the weights of recurrent layers, and the joint projection of queries,
    keys and values in :class:`torch.nn.MultiheadAttention`.

    Returns
    -------
    dict of str to float
        The share of each in all parameters of the network.
    """
    layers = [module for module in model.modules() if is_linear(module)]
    seen = {id(parameter) for layer in layers for parameter in layer.parameters()}
    every = [(n, p) for n, p in model.named_parameters() if not is_lazy(p)]
    total = sum(parameter.numel() for _, parameter in every)
    return {n: p.numel() / total for n, p in every if p.ndim > 1 and id(p) not in seen}


class Dimensions(NamedTuple):
    """The shape of a layer's matrices, how many they are, and the bytes of an entry."""

    rows: int
    columns: int
    groups: int
    itemsize: int

    @property
    def size(self) -> int:
        """Entries of all matrices."""
        return self.rows * self.columns * self.groups


def dimensions(layer: nn.Module) -> Dimensions:
    """Return the dimensions of a linear layer or convolution, whether it is taken or not."""
    view = matricized(layer)
    if view is not None:
        matrix, *rest = view.matrices()
        rows, columns = matrix.shape
        return Dimensions(rows, columns, 1 + len(rest), matrix.element_size())
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim == 0:
        return Dimensions(0, 0, 1, 0)
    return Dimensions(weight.shape[0], weight[:1].numel(), 1, weight.element_size())


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
    are copied, or shared with the products. What else the layer has goes over to the new one.
    """
    new: Any = view.replacement(products, copy)
    inherit(new, view.layer, names[0])
    if shifts:
        with torch.no_grad():
            new.bias += torch.cat([torch.as_tensor(shift) for shift in shifts]).to(new.bias)
    for name in names:
        model.set_submodule(name, new)


def as_array(tensor: Tensor) -> Array:
    """Return `tensor` as the solvers take it; on the CPU they are fastest on NumPy arrays."""
    return backend.to_numpy(tensor) if tensor.device.type == "cpu" else tensor.detach()
