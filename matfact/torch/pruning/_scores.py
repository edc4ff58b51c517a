"""Scores of weights for pruning; the highest scores are kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase

from matfact.torch.pruning._masks import (
    Predicate,
    Prunable,
    check_weights,
    prunable_parameters,
    unchanged_on_failure,
)
from matfact.torch.running._batches import device_of, eval_mode, forward
from matfact.torch.running._random import RandomState, batch_states, drawing, generators_of
from matfact.torch.running._tensors import first_filled, output_tensor

Method = Literal["random", "magnitude", "snip", "grasp", "synflow"]
#: Loss of an output and its batch.
Loss = Callable[[Any, Any], Tensor]
#: Returns the scores of all parameters, including masked weights.
Scores = Callable[[], list[Tensor]]

#: Divisor of the outputs before the loss of GraSP, which evens out predictions.
_TEMPERATURE = 200.0
_NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_ACTIVATIONS = tuple(
    getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"
)


def pruning_scores(
    model: nn.Module,
    method: Method,
    batches: Iterable[Any] = (),
    *,
    loss: Loss | None = None,
    prunable: Predicate | None = None,
    random_state: Any = None,
) -> dict[str, Tensor]:
    """Return the score of every weight; higher is more important.

    Parameters
    ----------
    model : torch.nn.Module
        The network. Masks are created if it has none.
    method : {"random", "magnitude", "snip", "grasp", "synflow"}
        "snip" is ``|g ⊙ θ|`` with the gradient `g` of the loss (Lee et al., 2019). "grasp" is
        ``θ ⊙ Hg`` with the Hessian `H`; it is high if removing the weight would weaken the gradient
        (Wang et al., 2020) (the paper uses the opposite sign). "synflow" is ``|θ| ⊙ ∂R/∂|θ|`` in
        double precision (Tanaka et al., 2020). `R` is the sum of the network's outputs for inputs
        of ones, with absolute weights and without biases, normalizations and activation modules.
    batches, loss, prunable, random_state
        As in `prune_network`.

    Returns
    -------
    dict of str to Tensor
        Scores with the shape of each parameter.

    Raises
    ------
    ValueError
        If an argument is invalid, or a loss or score is not finite.

    References
    ----------
    - N. Lee, T. Ajanthan, P. Torr, "SNIP: single-shot network pruning based on connection
      sensitivity", ICLR 2019.
    - C. Wang, G. Zhang, R. Grosse, "Picking winning tickets before training by preserving
      gradient flow", ICLR 2020.
    - H. Tanaka, D. Kunin, D. Yamins, S. Ganguli, "Pruning neural networks without any data
      by iteratively conserving synaptic flow", NeurIPS 2020.
    """
    parameters = prunable_parameters(model, prunable)
    check_weights(parameters)
    with unchanged_on_failure(parameters):
        scores = scorer(model, parameters, method, batches, loss, prunable, random_state)()
    return {p.label: score for p, score in zip(parameters, scores, strict=True)}


def scorer(
    model: nn.Module,
    parameters: list[Prunable],
    method: Method,
    batches: Iterable[Any],
    loss: Loss | None,
    prunable: Predicate | None,
    random_state: Any,
) -> Scores:
    """Return the function that scores `parameters` under their current masks."""
    score = _scorer(model, parameters, method, batches, loss, prunable, random_state)

    def checked() -> list[Tensor]:
        scores = score()
        check_finite(parameters, scores, method)
        return scores

    return checked


def _scorer(
    model: nn.Module,
    parameters: list[Prunable],
    method: Method,
    batches: Iterable[Any],
    loss: Loss | None,
    prunable: Predicate | None,
    random_state: Any,
) -> Scores:
    if method == "random":
        random = check_random_state(random_state)
        return lambda: [_random(p.values, random) for p in parameters]
    if method == "magnitude":
        return lambda: [p.values.detach().abs() for p in parameters]
    first = first_filled(batches)
    if method == "synflow":
        return _SynFlow(model, parameters, first, prunable)
    if loss is None:
        raise ValueError(f"loss must be given for {method!r}, got None.")
    score = {"snip": snip, "grasp": grasp}[method]
    return lambda: score(model, parameters, batches, loss)


def check_finite(parameters: Iterable[Prunable], scores: Iterable[Tensor], method: str) -> None:
    """Raise ``ValueError`` for scores that cannot be ranked."""
    for parameter, score in zip(parameters, scores, strict=True):
        if not bool(torch.isfinite(score).all()):
            raise ValueError(
                f"scores of method={method!r} must be finite, but those of {parameter.label} are "
                "not: weights, batches or gradients are too large or hold NaN."
            )


def _random(values: Tensor, random: np.random.RandomState) -> Tensor:
    return torch.from_numpy(random.random_sample(tuple(values.shape))).to(values.device)


def snip(
    model: nn.Module, parameters: list[Prunable], batches: Iterable[Any], loss: Loss
) -> list[Tensor]:
    """Return ``|g ⊙ θ|``, with the gradient of the sum of losses over `batches`."""
    with _as_in_training(model, parameters) as originals:
        gradients = [torch.zeros_like(original) for original in originals]
        for value in _losses(model, batches, loss):
            _add(gradients, torch.autograd.grad(value, originals, allow_unused=True))
    return [
        _times(gradient, original.detach()).abs()
        for gradient, original in zip(gradients, originals, strict=True)
    ]


def grasp(
    model: nn.Module, parameters: list[Prunable], batches: Iterable[Any], loss: Loss
) -> list[Tensor]:
    """Return ``θ ⊙ Hg``, with the sum of losses over `batches`."""

    def flattened(output: Any, batch: Any) -> Tensor:
        return loss(output / _TEMPERATURE if isinstance(output, Tensor) else output, batch)

    with _as_in_training(model, parameters) as originals:
        total = [torch.zeros_like(original) for original in originals]
        for value in _losses(model, batches, flattened):
            _add(total, torch.autograd.grad(value, originals, allow_unused=True))
        products = [torch.zeros_like(original) for original in originals]
        for value in _losses(model, batches, flattened):
            gradients = torch.autograd.grad(
                value, originals, create_graph=True, allow_unused=True, materialize_grads=True
            )
            flow: Any = sum(_times(g, t).sum() for g, t in zip(gradients, total, strict=True))
            _add(products, torch.autograd.grad(flow, originals, allow_unused=True))
    return [
        _times(product, original.detach())
        for product, original in zip(products, originals, strict=True)
    ]


def _losses(model: nn.Module, batches: Iterable[Any], loss: Loss) -> Iterator[Tensor]:
    """Yield the loss of each batch, always with the same random numbers."""
    for index, (batch, state) in enumerate(zip(batches, batch_states(model), strict=False)):
        with drawing(state):
            value = loss(forward(model, batch), batch)
        if value.numel() != 1 or not bool(torch.isfinite(value)):
            found = value.item() if value.numel() == 1 else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"loss must be one finite number for each batch, got {found} for batch {index}."
            )
        yield value


def _times(gradient: Tensor, values: Tensor) -> Tensor:
    """Return the first-order change of a loss with each value, real or complex."""
    return (gradient.conj() * values).real if values.is_complex() else gradient * values


def _add(totals: list[Tensor], terms: Sequence[Tensor | None]) -> None:
    for total, term in zip(totals, terms, strict=True):
        if term is not None:
            total += term


@contextlib.contextmanager
def _as_in_training(model: nn.Module, parameters: list[Prunable]) -> Iterator[list[Tensor]]:
    """Yield parameters with gradients; modes, flags and running statistics are restored."""
    for parameter in parameters:
        _ = parameter.mask  # created now, since it may replace the parameter
    originals = [parameter.original for parameter in parameters]
    flags = [original.requires_grad for original in originals]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with eval_mode(model), torch.enable_grad():
        try:
            model.train()
            for original in originals:
                original.requires_grad_(True)
            yield originals
        finally:
            for original, flag in zip(originals, flags, strict=True):
                original.requires_grad_(flag)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


class _SynFlow:
    """Synaptic flow through a positive, linear copy of the network."""

    def __init__(
        self, model: nn.Module, parameters: list[Prunable], batch: Any, prunable: Predicate | None
    ) -> None:
        self._parameters = parameters
        for parameter in parameters:
            if parameter.original.is_complex():
                raise ValueError(
                    f"method must not be 'synflow' for complex weights, such as {parameter.label}."
                )
            _ = parameter.mask  # so that the copy has masks too
        self._copy = copy.deepcopy(model).double().eval()
        self._copied = prunable_parameters(self._copy, prunable)
        self._batch = _ones(batch)
        self._state = RandomState.now(device_of(model), generators_of(model))
        with torch.no_grad():
            for name, values in self._copy.named_parameters():
                values.copy_(torch.zeros_like(values) if name.endswith("bias") else values.abs())
                values.requires_grad_(False)
        for module in self._copy.modules():
            if isinstance(module, (*_NORMALIZATIONS, *_ACTIVATIONS)):
                module.register_forward_hook(_identity)

    def __call__(self) -> list[Tensor]:
        originals = [copied.original for copied in self._copied]
        for copied, parameter in zip(self._copied, self._parameters, strict=True):
            copied.mask.copy_(parameter.mask)
            copied.original.requires_grad_(True)
        with torch.enable_grad(), drawing(self._state):
            flow = output_tensor(forward(self._copy, self._batch)).sum()
            gradients = torch.autograd.grad(
                flow, originals, allow_unused=True, materialize_grads=True
            )
        return [
            gradient * original.detach()
            for gradient, original in zip(gradients, originals, strict=True)
        ]


def _identity(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0]


def _ones(batch: Any) -> Any:
    """Return one sample of a batch, with all floating-point entries set to one."""
    if isinstance(batch, Tensor):
        one = batch[:1]
        return torch.ones_like(one, dtype=torch.float64) if one.is_floating_point() else one
    if hasattr(batch, "keys"):
        return {key: _ones(batch[key]) for key in batch.keys()}  # noqa: SIM118
    return [_ones(item) for item in batch] if isinstance(batch, (list, tuple)) else batch
