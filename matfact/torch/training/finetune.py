"""Fine-tuning of compressed networks on fixed supports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact._progress import Bar
from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize
from matfact.torch.layers._coded import refuse_codes
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._batches import eval_mode, forward
from matfact.torch.running._offloaded import refuse_offloaded
from matfact.torch.running._tensors import check_trainable, output_tensor, outside_inference_mode
from matfact.torch.training._loop import FineTuning, train

#: Distance between an output and the teacher's output, both tensors.
Distance = Callable[[Tensor, Tensor], Tensor]


@outside_inference_mode
def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    epochs: int = 10,
    teacher: nn.Module | None = None,
    distance: Distance = functional.mse_loss,
    distillation: float = 0.5,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    progress: bool | Callable[[int, float, float | None], None] | None = False,
) -> FineTuning:
    """Train `model`, optionally with a dense teacher, and keep the best epoch.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place. Supports are fixed with any optimizer, since positions are
        not parameters. Of quantized values only the scales are trained.
    batches : iterable
        Training batches, iterated in each epoch: tensors, tuples (labels after the inputs) or
        mappings.
    loss : callable, optional
        Called with the output of the network and the batch, on the device of the network.
        Required without a teacher.
    optimizer : torch.optim.Optimizer, optional
        By default AdamW with a learning rate of 1e-3.
    schedule : torch.optim.lr_scheduler.LRScheduler, optional
        Schedule of `optimizer`, advanced after each of its steps.
    epochs : int, default=10
        Maximum number of passes over the batches.
    teacher : torch.nn.Module, optional
        Network with the target outputs, usually the dense one.
    distance : callable, default=torch.nn.functional.mse_loss
        Distance between outputs, as tensors; for logits see `soft_cross_entropy`.
    distillation : float, default=0.5
        Weight of `distance` relative to `loss`; 1 without a loss.
    validate : callable, optional
        Returns a score of the network, called in eval mode before the first epoch and after each.
        Higher is better; NaN is worst.
    patience : int, optional
        Stop after this many epochs without a better score.
    progress : bool or callable, default=False
        Whether to show a bar with the epoch, its mean loss and the time left, in a terminal (on
        standard error) or a notebook; or a function, called after each epoch with its number, its
        mean loss and its score.

    Returns
    -------
    FineTuning
        Losses and scores. The mode of the network is restored. With `validate`, the network ends in
        its best state, including buffers, even if training fails; the initial state counts too.

    Raises
    ------
    ValueError
        If a loss or a trained parameter becomes infinite or NaN (with `validate`, training then
        stops with a warning), or if `validate` always returns NaN.
    """
    bar = Bar(progress)
    check_trainable(model)
    refuse_offloaded(model)
    if loss is None and teacher is None:
        raise ValueError("loss must be given without a teacher, got None for both.")
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must lie between 0 and 1, got {distillation}.")
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches must be a collection for {epochs} epochs, got a {type(batches).__name__}, "
            "which can be used only once: make it a list."
        )
    if patience is not None and validate is None:
        raise ValueError(f"patience needs validate, got patience={patience} without it.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}.")
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective = _objective(loss, teacher, distance, distillation)
    return train(
        model, batches, objective, optimizer, schedule,
        epochs=epochs, validate=validate, patience=patience, bar=bar,
    )  # fmt: skip


def _objective(
    loss: Callable[[Any, Any], Tensor] | None,
    teacher: nn.Module | None,
    distance: Distance,
    distillation: float,
) -> Callable[[Any, Any], Tensor]:
    """Return the training loss as a function of output and batch."""
    if teacher is None:
        assert loss is not None
        return loss

    def to_teacher(output: Any, batch: Any) -> Tensor:
        with eval_mode(teacher), torch.no_grad():
            target = output_tensor(forward(teacher, batch))
        return distance(output_tensor(output), target)

    if loss is None:
        return to_teacher
    return lambda output, batch: (
        (1 - distillation) * loss(output, batch) + (distillation * to_teacher(output, batch))
    )


def soft_cross_entropy(temperature: float = 2.0) -> Distance:
    """Return the soft cross-entropy between class probabilities, for distillation on logits.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015.

    Parameters
    ----------
    temperature : float, default=2.0
        Divisor of the logits; higher values give more weight to unlikely classes.
    """

    def distance(output: Tensor, target: Tensor) -> Tensor:
        student = functional.log_softmax(output / temperature, dim=-1)
        teacher = functional.log_softmax(target / temperature, dim=-1)
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
        return temperature**2 * divergence.sum(-1).mean()

    return distance


@outside_inference_mode
def balance_factors(model: nn.Module) -> nn.Module:
    """Balance the norms of the factors of each layer in `model`, without changing outputs.

    One learning rate then suits all factors. Newly compressed layers are balanced.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer, or a network that contains some; changed in place.
    """
    refuse_offloaded(model)
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            _set_values(layer, layer.to_product().rescaled(1.0))
    return model


@outside_inference_mode
def merge_update(layer: FactorizedLinear, update: Tensor) -> FactorizedLinear:
    """Add a dense update, such as that of a low-rank adapter, to the values of `layer`.

    Supports do not change, so the part of the update outside of them is lost; for sparse supports
    this is most of it. Adapters trained with `add_adapters` lose nothing.

    Parameters
    ----------
    layer : FactorizedLinear
        Changed in place: a few steps move its values so that the product approximates
        weight + `update`.
    update : Tensor of shape (out_features, in_features)
        Update of the weight.
    """
    refuse_codes(layer, "to take up an update")
    refuse_offloaded(layer)
    target = (layer.weight + update).detach()
    eye = torch.eye(layer.in_features, dtype=target.dtype, device=target.device)
    _set_values(layer, finalize(layer.to_product(), target, eye))
    return layer


@torch.no_grad()
def _set_values(layer: FactorizedLinear, product: FactorProduct) -> None:
    for module, factor in zip(layer.chain, product.factors, strict=True):
        if module.trained:
            module.assign(factor)
