"""Harm that errors of each layer do to the output of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_views
from matfact.torch.running._batches import attended, eval_mode, forward
from matfact.torch.running._random import RandomState, batch_states, drawing
from matfact.torch.training._values import check_outputs, filled, relative_errors, rows
from matfact.torch.training.finetune import Distance, output_tensor


@torch.no_grad()
def output_harm(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    *,
    noise: float = 0.1,
    distance: Distance | None = None,
) -> dict[str, float]:
    """Measure how much an error in each layer's outputs changes the output of the network.

    The network runs once for each batch and layer, with random noise added to the layer's outputs.
    No labels are needed. Use the result as the weights of :class:`Budget`: layers whose errors
    matter then get more of it.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batches : iterable
        Inputs of the network, as in :class:`Calibration`; a few are enough.
    layers : str or sequence of str, optional
        A regular expression to search in names of linear or convolutional layers, or their names.
        All such layers by default.
    noise : float, default=0.1
        Size of the noise, relative to the layer's outputs in a batch, without their mean if the
        layer has a bias.
    distance : callable, optional
        Distance between outputs and those without noise, with a row for each token or sample
        without padding; for logits see :func:`soft_cross_entropy`. By default the squared error
        of each row relative to its square.

    Returns
    -------
    dict of str to float
        Distance ÷ `noise`² of each layer, the mean over batches. Layers that no batch reaches are
        left out, such as those that attention reads without calling them.

    Raises
    ------
    ValueError
        If `noise` is not positive and finite, or outputs are not finite; the message names the
        layer.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import Budget, compress, output_harm
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> _ = torch.manual_seed(0)
    >>> model = Sequential(Linear(32, 64), ReLU(), Linear(64, 64), ReLU(), Linear(64, 8))
    >>> batches = [torch.randn(16, 32)]
    >>> budget = Budget(0.4, weights=output_harm(model, batches), densities=(0.1, 0.4))
    >>> small, report = compress(model, "magnitude", budget=budget, calibration=batches)
    >>> report.nbytes <= 0.4 * report.dense_nbytes
    True
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be positive and finite, got {noise}.")
    views = layer_views(model, layers)
    found: dict[str, list[float]] = {name: [] for name in views}
    with eval_mode(model):
        for (number, batch), state in zip(filled(batches), batch_states(model), strict=False):
            wanted = _output(model, batch, state)
            check_outputs(wanted, number)
            for name, view in views.items():
                hook = _Noise(noise, state, has_bias=view.layer.bias is not None)
                handle = view.layer.register_forward_hook(hook)
                try:
                    noisy = _output(model, batch, state)
                finally:
                    handle.remove()
                if hook.was_called:
                    found[name].append(_distance(noisy, wanted, batch, model, distance) / noise**2)
                    if not math.isfinite(found[name][-1]):
                        raise ValueError(
                            f"outputs must be finite, unlike those with noise in layer {name!r}, "
                            f"for batch {number}."
                        )
    return {name: math.fsum(each) / len(each) for name, each in found.items() if each}


def _output(model: nn.Module, batch: Any, state: RandomState) -> Tensor:
    with drawing(state):
        return output_tensor(forward(model, batch))


def _distance(
    found: Tensor, wanted: Tensor, batch: Any, model: nn.Module, distance: Distance | None
) -> float:
    if distance is None:
        return float(relative_errors(found, wanted, batch, model).double().mean())
    each = [rows(attended(output, batch, model)) for output in (found, wanted)]
    return float(distance(*each)) - float(distance(each[1], each[1]))


class _Noise:
    """Forward hook that adds noise to the outputs of a layer, the same in each run."""

    def __init__(self, size: float, state: RandomState, *, has_bias: bool) -> None:
        self._size, self._has_bias, self.was_called = size, has_bias, False
        self._generator = torch.Generator()
        self._generator.set_state(state.host)

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.was_called = True
        axis = 1 if hasattr(layer, "kernel_size") else -1
        others = [i for i in range(output.ndim) if i != axis % output.ndim]
        around = output.mean(others, keepdim=True) if self._has_bias and others else 0
        scale = self._size * (output - around).abs().square().mean().sqrt()
        noise = torch.randn(output.shape, generator=self._generator, dtype=torch.float32)
        return output + scale * noise.to(output.device, scale.dtype)
