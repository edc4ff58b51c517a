"""Storage of pruned weights: their values, and one bit per entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from matfact._layers import matrix_shape
from matfact.operators import DenseFactor, Factor, FactorProduct, SparseFactor
from matfact.torch.layers._factors import FactorModule
from matfact.torch.layers._matricized import MatricizedTransposed, matricized
from matfact.torch.pruning._masks import Prunable

#: Approximate overhead of a separate file, in bytes.
_FILE = 512


class Masked(NamedTuple):
    """A stored masked parameter.

    Attributes
    ----------
    content : FactorProduct or Tensor
        The remaining values, or all values if that takes fewer bytes.
    shape : tuple of int
        Shape in the network.
    """

    content: FactorProduct | Tensor
    shape: tuple[int, ...]


def masked_tensors(model: nn.Module) -> dict[str, Masked]:
    """Return the masked parameters of a network, by their names without masks.

    Shared parameters with a shared mask come once.
    """
    distinct: dict[tuple[int, int], Prunable] = {}
    for p in masked_parameters_of(model):
        if not isinstance(p.module, FactorModule):
            mask = p.module.get_buffer(f"{p.name}_mask")
            distinct.setdefault((id(p.original), id(mask)), p)
    return {p.label: _stored(p) for p in distinct.values()}


def mask_names(model: nn.Module) -> set[str]:
    """Return the state-dict names of the tensors behind masked parameters."""
    masked: dict[nn.Module, list[str]] = {}
    for parameter in masked_parameters_of(model):
        masked.setdefault(parameter.module, []).append(parameter.name)
    return {
        joined(prefix, f"{name}_{kind}")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in masked.get(module, ())
        for kind in ("orig", "mask")
    }


def joined(prefix: str, name: str) -> str:
    """Return the full name of `name` in the module `prefix`."""
    return f"{prefix}.{name}" if prefix else name


def stored_product(chain: list[FactorModule]) -> FactorProduct:
    """Return the product of factors without masked values."""
    return FactorProduct([_stored_factor(module) for module in chain])


def masked_parameters_of(model: nn.Module) -> Iterator[Prunable]:
    """Yield the masked parameters of a network, also if others read them without the mask."""
    for prefix, module in model.named_modules():
        for buffer in module._buffers:
            parameter = Prunable("", module, buffer.removesuffix("_mask"))
            if buffer.endswith("_mask") and parameter.masked:
                label = joined(prefix, parameter.name)
                yield dataclasses.replace(parameter, label=label)


def _values(parameter: Prunable) -> tuple[Tensor, Tensor]:
    """Return masked values and the mask without changing the module."""
    mask = parameter.module.get_buffer(f"{parameter.name}_mask").detach()
    return (parameter.original.detach() * mask).masked_fill(mask == 0, 0), mask != 0


def _stored(parameter: Prunable) -> Masked:
    values, mask = _values(parameter)
    if values.ndim < 2:
        return Masked(values, tuple(values.shape))
    # Products represent the matrix (outputs, inputs), even if the layer stores the transpose.
    oriented, support = (t.T if _is_transposed(parameter.module) else t for t in (values, mask))
    matrix = matrix_shape(tuple(oriented.shape))
    factor = SparseFactor.from_dense(oriented.reshape(matrix), support.reshape(matrix))
    nbytes = factor.value_nbytes() + factor.index_nbytes("smallest") + _FILE
    if nbytes >= values.numel() * values.element_size():
        return Masked(values, tuple(values.shape))
    return Masked(FactorProduct([factor]), tuple(oriented.shape))


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a transposed weight."""
    return isinstance(matricized(module), MatricizedTransposed)


def _stored_factor(module: FactorModule) -> Factor:
    """Return a factor without masked values; in blocks they stay as zeros."""
    factor = module.to_factor()
    parameter = Prunable("values", module, "values")
    if not parameter.masked:
        return factor
    values, mask = _values(parameter)
    if isinstance(factor, SparseFactor):
        kept = mask.cpu().numpy()
        return SparseFactor.from_locations(values[mask], factor.locations[kept], factor.shape)
    if isinstance(factor, DenseFactor):
        return SparseFactor.from_dense(values, mask)
    return factor.with_values(values)
