"""How much a loss depends on the outputs of each layer."""

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
    """Return how much the loss changes where a layer's outputs are disturbed.

    The mean square of the first-order change of the loss, for disturbances of random directions,
    ÷ their squared relative size: the weight of a layer's squared error in
    :func:`matfact.allocation.allocate`.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batches : iterable
        What it is called with, as for :func:`input_statistics`.
    loss : callable
        Returns the loss to be differentiated from an output and its batch.
    layers : str or sequence of str, optional
        A regular expression searched in names of linear or convolutional layers, or their names;
        all of them by default.

    Returns
    -------
    dict of str to float
        The mean over batches, 0 for layers that were not reached.
    """
    views = layer_views(model, layers)
    totals = dict.fromkeys(views, 0.0)
    outputs: list[tuple[str, Tensor]] = []
    count = 0

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Disturbances matter as much where nothing is trained.
            output = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append((name, output))
            return output.clone()  # which activations may overwrite

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
    """Yield, for each call of a layer, how much the loss of a batch changes with its output."""
    tensors = [output for _, output in outputs]
    slopes = torch.autograd.grad(value, tensors, allow_unused=True) if tensors else ()
    for (name, output), slope in zip(outputs, slopes, strict=True):
        if slope is not None:
            axis = 1 if hasattr(views[name].layer, "kernel_size") else -1
            energy, steepness = (
                each.detach().abs().double().square().sum(axis) for each in (output, slope)
            )
            yield name, float((energy / output.shape[axis] * steepness).sum())
