"""Matrix views of layers: their matrices, the inputs of these, and factorized replacements."""

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
from matfact.torch.running._offloaded import fetched


class Matricized(ABC):
    """View of a layer as one matrix, or one per group.

    Parameters
    ----------
    layer : torch.nn.Module
        The layer, which is not changed.
    """

    #: Whether the layer multiplies the rows of its inputs.
    by_rows: ClassVar[bool] = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """The weight used by the layer, on the meta device if it is offloaded."""
        weight: Tensor = effective(self.layer, "weight")
        return weight.detach()

    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """Return the matrices, of shape (outputs, inputs)."""

    @abstractmethod
    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        """Return the layer with its matrices replaced by `products`, copied or not."""

    @abstractmethod
    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Yield the inputs (n, inputs) of each matrix for a layer input `x`, in chunks."""

    def arrays(self) -> list[Array]:
        """Return the matrices for the solvers: NumPy arrays on the CPU, else tensors."""
        with fetched(self.layer):
            return [as_array(matrix) for matrix in self.matrices()]


class MatricizedLinear(Matricized):
    """Linear layer, dense or factorized: ``weight`` is the matrix."""

    by_rows = True

    def matrices(self) -> list[Tensor]:
        return [self.weight]

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedLinear(products[0], self.layer.bias, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        yield [x.reshape(-1, x.shape[-1])]


class MatricizedTransposed(MatricizedLinear):
    """Linear layer with a transposed weight, as in the GPT-2 of `transformers`."""

    def matrices(self) -> list[Tensor]:
        return [self.weight.T]


class MatricizedConv(Matricized):
    """Convolution: the kernel of each group, flattened to (out, in · kernel size)."""

    def matrices(self) -> list[Tensor]:
        return list(self.weight.flatten(1).chunk(self.layer.groups))

    def replacement(self, products: Sequence[FactorProduct], copy: bool) -> nn.Module:
        return FactorizedConv.from_products(self.layer, products, copy=copy)

    def _inputs(self, x: Tensor) -> Iterator[list[Tensor]]:
        conv = self.layer
        batch = x if x.ndim == len(conv.kernel_size) + 2 else x[None]
        for sample in batch.split(1):  # one image at a time, to bound memory
            patches = unfold(pad(sample, conv), conv.kernel_size, conv.stride, conv.dilation)
            yield list(patches[0].chunk(conv.groups, dim=1))


#: Matrix views by layer class.
_VIEWS: dict[type, type[Matricized]] = {
    nn.Linear: MatricizedLinear,
    FactorizedLinear: MatricizedLinear,
    nn.Conv1d: MatricizedConv,
    nn.Conv2d: MatricizedConv,
    nn.Conv3d: MatricizedConv,
    FactorizedConv: MatricizedConv,
}
#: Methods that define what a module computes.
_METHODS = ("__call__", "_call_impl", "forward", "_conv_forward")
#: Stands for the weight of a layer that is already factorized.
_FACTORIZED = Weight("float32", (1, 1))
_TENSORS = (Tensor, nn.Parameter, nn.UninitializedParameter)


def matricized(layer: nn.Module) -> Matricized | None:
    """Return the matrix view of `layer`, or None if it has none."""
    if refusal(layer) is not None:
        return None
    return _VIEWS.get(_family(layer), MatricizedTransposed)(layer)  # type: ignore[arg-type]


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer or a convolution by class."""
    return _family(layer) is not None


def refusal(layer: nn.Module) -> str | None:
    """Return why `layer` has no matrix view, or None if it has one.

    It has one if it computes what its torch class does, with a floating or complex weight. The
    values of the weight do not matter, and need not be in memory.
    """
    return reason_to_keep(facts(layer))


def facts(layer: nn.Module) -> Weight:
    """Return the known properties of the weight of `layer`."""
    if odd := _odd_class(layer):
        return Weight("", (), odd=odd)
    if isinstance(layer, (FactorizedLinear, FactorizedConv)):
        return _FACTORIZED
    weight = effective(layer, "weight")
    if odd := _odd_tensor(weight):
        return Weight("", (), odd=odd)
    known = Weight(str(weight.dtype).removeprefix("torch."), (1, 1), others=others(layer))
    if is_lazy(weight):  # its shape is not known yet
        return known
    bias, n_axes = effective(layer, "bias"), 2 + len(getattr(layer, "kernel_size", ()))
    return known._replace(
        shape=tuple(weight.shape),
        axes=(n_axes,),
        bias=None if bias is None else tuple(bias.shape),
    )


def _odd_class(layer: nn.Module) -> str | None:
    """Return why a layer is not computed like a linear layer or convolution of torch, or None."""
    base = _family(layer)
    if base is None:
        return "not a linear layer or convolution"
    if base not in _VIEWS and base.__module__.partition(".")[0] != "transformers":
        return "class other than the Conv1D of transformers"
    changed = [name for name in _METHODS if _differs(layer, base, name)]
    return f"layer with a custom {changed[0]}" if changed else None


def _family(layer: nn.Module) -> type | None:
    """Return the linear layer or convolution class that `layer` derives from."""
    for base in type(layer).__mro__:
        if base in _VIEWS or (base.__name__ == "Conv1D" and hasattr(layer, "nf")):
            return base
    return None


def _differs(layer: nn.Module, base: type, name: str) -> bool:
    """Whether a method of `layer` differs from that of its base class."""
    own = getattr(type(layer), name, None) is getattr(base, name, None)
    if not own or name not in vars(layer):
        return not own
    takes_turns = getattr(vars(layer)[name], "takes_turns", False)  # of a running calibration
    return not (takes_turns or is_moved_by_accelerate(layer))


def _odd_tensor(weight: Any) -> str | None:
    """Return why a weight cannot be read as an array, or None."""
    if not isinstance(weight, Tensor):
        return "layer with no weight"
    if type(weight) not in _TENSORS:
        return f"weight of class {type(weight).__name__}"
    return None if weight.layout == torch.strided else f"weight of layout {weight.layout}"


def distinct_layers(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Return all modules that are not inside a layer, with all of their names."""
    names: dict[nn.Module, list[str]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[0] in inside:
            inside.add(name)
        elif name:  # the network itself cannot be replaced
            names.setdefault(module, []).append(name)
            if matricized(module) is not None:
                inside.add(name)
    return [(found, module) for module, found in names.items()]


def other_matrices(model: nn.Module) -> dict[str, float]:
    """Return the parameters with two or more axes outside of linear layers and convolutions.

    Examples are embeddings, the weights of recurrent layers, and the joint projection of queries,
    keys and values in `torch.nn.MultiheadAttention`.

    Returns
    -------
    dict of str to float
        Share of each in the network's parameters.
    """
    layers = [module for module in model.modules() if is_linear(module)]
    seen = {id(parameter) for layer in layers for parameter in layer.parameters()}
    every = [(n, p) for n, p in model.named_parameters() if not is_lazy(p)]
    total = sum(parameter.numel() for _, parameter in every)
    return {n: p.numel() / total for n, p in every if p.ndim > 1 and id(p) not in seen}


class Dimensions(NamedTuple):
    """Shape and number of a layer's matrices, and bytes per entry."""

    rows: int
    columns: int
    groups: int
    itemsize: int

    @property
    def size(self) -> int:
        """Entries of all matrices."""
        return self.rows * self.columns * self.groups


def dimensions(layer: nn.Module) -> Dimensions:
    """Return the dimensions of any linear layer or convolution."""
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
    """Replace the layer with the given `names` by one with `products`.

    `shifts`, one per product or none, are added to its bias. Values are copied, or shared with the
    products. The new layer inherits all other properties.
    """
    with fetched(view.layer):
        new: Any = view.replacement(products, copy)
        inherit(new, view.layer, names[0])
    if shifts:
        with torch.no_grad():
            new.bias += torch.cat([torch.as_tensor(shift) for shift in shifts]).to(new.bias)
    for name in names:
        model.set_submodule(name, new)


def as_array(tensor: Tensor) -> Array:
    """Return `tensor` for the solvers: on the CPU as a NumPy array, which is fastest."""
    return backend.to_numpy(tensor) if tensor.device.type == "cpu" else tensor.detach()
