"""Harm that errors of each layer do to the output of a network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_views
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import attended, checked, eval_mode, forward
from matfact.torch.running._random import RandomState, batch_states, drawing
from matfact.torch.running._tensors import is_filled, output_tensor, samplewise
from matfact.torch.running._traces import Traces
from matfact.torch.training._values import relative_errors, rows
from matfact.torch.training.finetune import Distance


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
    No labels are needed. Use the result as the weights of `Budget`: layers whose errors
    matter then get more of it.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batches : iterable
        Inputs of the network, as in `Calibration`; a few are enough.
    layers : str or sequence of str, optional
        A regular expression to search in names of linear or convolutional layers, or their names.
        All such layers by default.
    noise : float, default=0.1
        Size of the noise, relative to the layer's outputs in a batch without padding, and without
        their mean if the layer has a bias.
    distance : callable, optional
        Distance between outputs and those without noise, with a row for each token or sample
        without padding; for logits see `soft_cross_entropy`. By default the squared error
        of each row relative to its square.

    Returns
    -------
    dict of str to float
        Distance ÷ `noise`² of each layer, the mean over batches. Layers that no batch reaches are
        left out, since a weight of 0 would let a budget take all of their values.

    Raises
    ------
    ValueError
        If `noise` is not positive and finite or is lost in rounding, or outputs are not finite; the
        message names the layer.

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
    views, traces = layer_views(model, layers), Traces(model)
    totals, count = dict[str, float](), 0
    with eval_mode(model):
        for batch, state in zip(checked(batches), batch_states(model), strict=False):
            if not is_filled(batch):
                continue
            count += 1
            wanted = _output(model, batch, state, traces)
            for name, view in views.items():
                hook = _Noise(
                    noise, state, view, functools.partial(attended, batch=batch, model=model)
                )
                handle = _giver(model, name).register_forward_hook(hook)
                try:
                    found = _output(model, batch, state, traces)
                finally:
                    handle.remove()
                if not hook.was_called:
                    continue
                harm = _distance(found, wanted, batch, model, distance) / noise**2
                totals[name] = totals.get(name, 0.0) + harm
                if not math.isfinite(totals[name]):
                    raise ValueError(
                        f"outputs must be finite, unlike those with noise in layer {name!r}, for "
                        f"batch {count - 1}."
                    )
    return {name: max(totals[name] / count, 0.0) for name in views if name in totals}


def _giver(model: nn.Module, name: str) -> nn.Module:
    """Return the module that gives the outputs of a layer: itself, or its attention."""
    outer = model.get_submodule(name.rpartition(".")[0])
    is_projection = isinstance(outer, nn.MultiheadAttention) and name.endswith("out_proj")
    return outer if is_projection else model.get_submodule(name)


def _output(model: nn.Module, batch: Any, state: RandomState, traces: Traces) -> Tensor:
    with drawing(state):
        try:
            return output_tensor(forward(model, batch))
        finally:
            traces.restore()


def _distance(
    found: Tensor, wanted: Tensor, batch: Any, model: nn.Module, distance: Distance | None
) -> float:
    if distance is None:
        return float(relative_errors(found, wanted, batch, model).double().mean())
    each = [rows(attended(output, batch, model)) for output in (found, wanted)]
    return float(distance(*each)) - float(distance(each[1], each[1]))


class _Noise:
    """Forward hook that adds noise to the outputs of a layer, the same in each run."""

    def __init__(
        self, size: float, state: RandomState, view: Matricized, kept: Callable[[Tensor], Tensor]
    ) -> None:
        self._size, self._view, self._kept, self.was_called = size, view, kept, False
        self._generator = torch.Generator()
        self._generator.set_state(state.host)

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of attention, with its weights
            return self(layer, args, output[0]), *output[1:]
        self.was_called = True
        if self._size < (eps := torch.finfo(output.dtype).eps):
            raise ValueError(
                f"noise must be at least {eps:.0e} for a layer whose outputs are {output.dtype}, "
                f"got {self._size}."
            )
        scale = self._size * self._deviation(output)
        return samplewise(lambda sample: self._added(sample, scale), output)

    def _deviation(self, output: Tensor) -> Tensor:
        """Return the root mean square of outputs without padding and, with a bias, their mean."""
        output = self._kept(output) if self._view.by_rows else output
        # Squares of half precision would overflow.
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        axis = 1 if hasattr(self._view.layer, "kernel_size") else -1
        others = [i for i in range(exact.ndim) if i != axis % exact.ndim]
        has_mean = self._view.layer.bias is not None and others
        around = exact.mean(others, keepdim=True) if has_mean else 0
        return (exact - around).abs().square().mean().sqrt()

    def _added(self, output: Tensor, scale: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=self._generator, dtype=torch.float32)
        return (output + scale * noise.to(output.device, scale.dtype)).to(output.dtype)
