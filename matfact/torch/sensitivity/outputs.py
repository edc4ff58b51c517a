"""Sensitivity of a loss to the outputs of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_views
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import checked, eval_mode, forward


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    layers: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the sensitivity of the loss to perturbations of each layer's outputs.

    This is the mean square of the first-order change of the loss for random perturbations, divided
    by their squared relative size. Use it as the weight of a layer's squared error in
    `matfact.allocation.allocate`.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batches : iterable
        Inputs of the network, as in `input_statistics`.
    loss : callable
        Returns the loss of an output and its batch.
    layers : str or sequence of str, optional
        A regular expression to search in names of linear or convolutional layers, or their names.
        All such layers by default.

    Returns
    -------
    dict of str to float
        Mean over batches; 0 for layers that were not reached.
    """
    views = layer_views(model, layers)
    totals = dict.fromkeys(views, 0.0)
    outputs: list[tuple[str, Tensor]] = []
    count = 0

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Perturbations matter for frozen layers too.
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((name, output))
            return output.clone()  # in-place activations may overwrite it

        return watch

    handles = [view.layer.register_forward_hook(hook(name)) for name, view in views.items()]
    try:
        with eval_mode(model), torch.enable_grad():
            for batch in checked(batches):
                count += 1
                outputs.clear()
                value = loss(forward(model, batch), batch)
                for name, found in _sensitivities(value, outputs, views):
                    totals[name] += found
    finally:
        for handle in handles:
            handle.remove()
    for name, total in totals.items():
        if not math.isfinite(total):
            raise ValueError(f"loss must have finite gradients, unlike those in layer {name!r}.")
    return {name: total / count for name, total in totals.items()}


def _sensitivities(
    value: Tensor, outputs: Sequence[tuple[str, Tensor]], views: Mapping[str, Matricized]
) -> Iterator[tuple[str, float]]:
    """Yield the sensitivity of a batch's loss to the output, for each call of a layer."""
    tensors = [output for _, output in outputs]
    slopes = torch.autograd.grad(value, tensors, allow_unused=True) if tensors else ()
    for (name, output), slope in zip(outputs, slopes, strict=True):
        if slope is not None:
            axis = 1 if hasattr(views[name].layer, "kernel_size") else -1
            energy, steepness = (
                each.detach().abs().double().square().sum(axis) for each in (output, slope)
            )
            yield name, float((energy / output.shape[axis] * steepness).sum())
