"""FLOPs of a network, counted in a forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from matfact.torch.layers._coded import refuse_codes
from matfact.torch.layers._factors import FactorModule
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.pruning._masks import Predicate, Prunable, is_layer, prunable_parameters
from matfact.torch.running._batches import as_written, eval_mode, forward


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs (multiplications and additions) of a network for a batch.

    Attributes
    ----------
    stored : dict of str to int
        FLOPs of each parameter, counting all values.
    kept : dict of str to int
        FLOPs of each parameter, counting nonzero values.
    """

    stored: dict[str, int]
    kept: dict[str, int]

    @property
    def total(self) -> int:
        """FLOPs of all nonzero values."""
        return sum(self.kept.values())

    @property
    def sparsity(self) -> float:
        """Share of the network's FLOPs saved by zeros."""
        stored = sum(self.stored.values())
        return 1.0 - self.total / stored if stored else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Return the share of FLOPs saved by zeros in each called layer."""
        return {
            label: 1.0 - self.kept[label] / stored
            for label, stored in self.stored.items()
            if stored
        }


def count_flops(model: nn.Module, batch: Any, prunable: Predicate | None = None) -> FlopCount:
    """Count the FLOPs of linear and convolutional layers in a forward pass.

    Hooks record how often each layer runs and on how many rows or positions, so strides, sequences
    and repeated or missing calls are counted correctly. Each nonzero value takes one multiplication
    and one addition per row or position; for factorized layers these are the values of the factors.

    Parameters
    ----------
    model : torch.nn.Module
        The network, pruned or not.
    batch : tensor, tuple or mapping
        Input of the network.
    prunable : callable, optional
        Parameters to count instead of all weights, see `prunable_parameters`. Layers with a
        custom forward count like others. Parameters of other modules are assumed to be applied once
        to every row of the first input.

    Returns
    -------
    FlopCount
        Counts for the whole batch.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch.pruning import count_flops
    >>> count_flops(torch.nn.Conv2d(1, 4, 3, bias=False), torch.ones(1, 1, 5, 5)).total
    648
    """
    if prunable is None:
        refuse_codes(model, "for operations to be counted")
    counted = _is_counted if prunable is None else prunable
    parameters = prunable_parameters(model, counted)
    callers = _callers(model, parameters, counted)
    uses = dict.fromkeys((p.label for p in parameters), 0)

    def hook(labels: list[str]) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            count = _positions(layer, args[0] if args else next(iter(kwargs.values())), output)
            for label in labels:
                uses[label] += count

        return add

    handles = [
        layer.register_forward_hook(hook(labels), with_kwargs=True) for layer, labels in callers
    ]
    try:
        with eval_mode(model), as_written(), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {p.label: (p.values.numel(), int(p.values.count_nonzero())) for p in parameters}
    return FlopCount(
        stored={label: 2 * n * uses[label] for label, (n, _) in sizes.items()},
        kept={label: 2 * n * uses[label] for label, (_, n) in sizes.items()},
    )


def _is_counted(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight of a layer, or the values of a factor."""
    if isinstance(module, FactorModule):
        return name == "values"
    return name == "weight" and is_layer(module)


def _callers(
    model: nn.Module, parameters: list[Prunable], counted: Predicate
) -> list[tuple[nn.Module, list[str]]]:
    """Return the layers that use parameters, with the parameters' labels.

    Factorized layers do not always call the modules of their factors.
    """
    owner: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, (FactorizedConv, FactorizedLinear)):
            for part in layer.modules():
                owner.setdefault(id(part), layer)
    callers: dict[int, tuple[nn.Module, list[str]]] = {}
    for p in parameters:
        for module, _ in [holder for holder in p.holders if counted(*holder)]:
            layer = owner.get(id(module), module)
            callers.setdefault(id(layer), (layer, []))[1].append(p.label)
    return list(callers.values())


def _positions(layer: nn.Module, x: Tensor, output: Any) -> int:
    """Return the number of rows or positions on which a call used each value."""
    if isinstance(layer, _ConvTransposeNd):
        return x.numel() // layer.in_channels
    if isinstance(layer, (_ConvNd, FactorizedConv)):
        return output.numel() // max(1, layer.out_channels)
    if x.is_nested:
        return sum(_positions(layer, sample, None) for sample in x.unbind())
    return math.prod(x.shape[:-1])
