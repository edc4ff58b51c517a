"""Work of a network, counted while it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from matfact.torch.layers._factors import FactorModule
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.pruning._masks import Predicate, Prunable, is_layer, prunable_parameters
from matfact.torch.running._batches import as_written, eval_mode, forward


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Multiplications and additions of each layer for a batch.

    Attributes
    ----------
    stored : dict of str to int
        FLOPs of each parameter if none of its values were zero.
    kept : dict of str to int
        FLOPs of those that are not zero.
    """

    stored: dict[str, int]
    kept: dict[str, int]

    @property
    def total(self) -> int:
        """FLOPs of all values that are not zero."""
        return sum(self.kept.values())

    @property
    def sparsity(self) -> float:
        """Share of the FLOPs that zeros save, in the whole network."""
        stored = sum(self.stored.values())
        return 1.0 - self.total / stored if stored else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Return the share of the FLOPs that zeros save in each layer that was called."""
        return {
            label: 1.0 - self.kept[label] / stored
            for label, stored in self.stored.items()
            if stored
        }


def count_flops(model: nn.Module, batch: Any, prunable: Predicate | None = None) -> FlopCount:
    """Count the work of linear and convolutional layers in a forward pass.

    Hooks see how often every layer runs, and on how many rows or positions, so that strides,
    sequences and layers that are called many times, or never, count as they are. Each value that
    is not zero makes one multiplication and one addition there; for factorized layers these are
    the values of the factors.

    Parameters
    ----------
    model : torch.nn.Module
        The network, pruned or not.
    batch : tensor, tuple or mapping
        What it is called with.
    prunable : callable, optional
        Parameters to count instead of all weights, see :func:`prunable_parameters`; weights of
        layers with a forward of their own count as those of others do. Those of modules of other
        kinds are taken to work once on every row of the first input.

    Returns
    -------
    FlopCount
        For the whole batch.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch.pruning import count_flops
    >>> count_flops(torch.nn.Conv2d(1, 4, 3, bias=False), torch.ones(1, 1, 5, 5)).total
    648
    """
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
    """Return the layers whose calls use parameters, with the labels of these.

    Factorized layers use their factors in ways of their own, not always by calling them.
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
    """Return on how many rows or positions a call has used each value."""
    if isinstance(layer, _ConvTransposeNd):
        return x.numel() // layer.in_channels
    if isinstance(layer, (_ConvNd, FactorizedConv)):
        return output.numel() // max(1, layer.out_channels)
    if x.is_nested:
        return sum(_positions(layer, sample, None) for sample in x.unbind())
    return math.prod(x.shape[:-1])
