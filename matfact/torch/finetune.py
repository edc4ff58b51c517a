"""Train a compressed network further: supports stay as they are, values learn."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize
from matfact.torch._batches import checked, device_of, eval_mode, forward, moved
from matfact.torch.layers import FactorizedLinear

#: What an output has to be close to the teacher's by: both outputs as tensors.
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class FineTuning:
    """How a fine-tuning went.

    Attributes
    ----------
    losses : list of float
        Mean training loss of each epoch.
    scores : list of float
        What `validate` returned after each epoch, if it was given.
    best_epoch : int
        The epoch, from 1, whose network was kept: the last one without `validate`.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = 0


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
    progress: Callable[[int, float, float | None], None] | None = None,
) -> FineTuning:
    """Train `model`, with a dense teacher if there is one, and keep its best epoch.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place. Whatever the optimizer, supports stay as they are, since
        positions are no parameters.
    batches : iterable
        Training batches, iterated anew each epoch: tensors, tuples (labels behind the inputs) or
        mappings.
    loss : callable, optional
        Takes the output of the network and the batch, on the device of the network. Needed
        without a teacher.
    optimizer : torch.optim.Optimizer, optional
        By default AdamW with a learning rate of 1e-3.
    schedule : torch.optim.lr_scheduler.LRScheduler, optional
        Of `optimizer`; goes on one step with each of its steps.
    epochs : int, default=10
        Most passes over the batches.
    teacher : torch.nn.Module, optional
        Network whose outputs the model has to match, usually the dense one.
    distance : callable, default=torch.nn.functional.mse_loss
        Distance of outputs, as tensors; for logits see :func:`soft_cross_entropy`.
    distillation : float, default=0.5
        Weight of `distance`, against that of `loss`; 1 where there is no loss.
    validate : callable, optional
        Score of the network, in eval mode; higher is better.
    patience : int, optional
        Stop after so many epochs without a better score.
    progress : callable, optional
        Called after each epoch with its number, its mean loss and its score.

    Returns
    -------
    FineTuning
        Losses and scores. The network ends in the mode it had, with the values of the best epoch.
    """
    if loss is None and teacher is None:
        raise ValueError("loss must be given where there is no teacher, got None for both.")
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must lie between 0 and 1, got {distillation}.")
    if patience is not None and validate is None:
        raise ValueError(f"patience needs validate, got patience={patience} without it.")
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective = _objective(loss, teacher, distance, distillation)
    result, best_state, training = FineTuning(), None, model.training
    for epoch in range(1, epochs + 1):
        model.train()
        losses = [_step(model, optimizer, schedule, objective, batch) for batch in checked(batches)]
        result.losses.append(math.fsum(losses) / len(losses))
        score = None
        if validate is None:
            result.best_epoch = epoch
        else:
            score = float(validate(model.eval()))
            result.scores.append(score)
            if score > max(result.scores[:-1], default=-math.inf):
                result.best_epoch, best_state = epoch, copy.deepcopy(model.state_dict())
        if progress is not None:
            progress(epoch, result.losses[-1], score)
        if patience is not None and epoch - result.best_epoch >= patience:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    model.train(training)
    return result


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


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    objective: Callable[[Any, Any], Tensor],
    batch: Any,
) -> float:
    """Take one step of the optimizer and return the loss before it."""
    batch = moved(batch, device_of(model))
    loss = objective(forward(model, batch), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return float(loss.detach())


def soft_cross_entropy(temperature: float = 2.0) -> Distance:
    """Return the distance of class probabilities that distillation uses on logits.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015.

    Parameters
    ----------
    temperature : float, default=2.0
        Divides the logits; higher compares unlikely classes too.
    """

    def distance(output: Tensor, target: Tensor) -> Tensor:
        student = functional.log_softmax(output / temperature, dim=-1)
        teacher = functional.log_softmax(target / temperature, dim=-1)
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
        return temperature**2 * divergence.sum(-1).mean()

    return distance


def output_tensor(output: Any) -> Tensor:
    """Return the tensor in what a network returns: logits, hidden states, or the first entry."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output_tensor(next(iter(output.values())) if hasattr(output, "values") else output[0])


def balance_factors(model: nn.Module) -> nn.Module:
    """Give the factors of each layer in `model` nearly equal norms, without changing outputs.

    One learning rate then suits all factors. Compressed layers start balanced.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer or a network of such, changed in place.
    """
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            _set_values(layer, layer.to_product().rescaled(1.0))
    return model


def merge_update(layer: FactorizedLinear, update: Tensor) -> FactorizedLinear:
    """Add a dense update, such as that of a low-rank adapter, on the supports `layer` has.

    What of the update lies outside of the supports is lost, which is most of it where these are
    sparse. Adapters to be trained from now on lose nothing by :func:`add_adapters`.

    Parameters
    ----------
    layer : FactorizedLinear
        Changed in place: its values become those whose product is nearest to weight + `update`
        that a few steps from the present ones find.
    update : Tensor of shape (out_features, in_features)
        What is added to the weight.
    """
    target = (layer.weight + update).detach()
    eye = torch.eye(layer.in_features, dtype=target.dtype, device=target.device)
    _set_values(layer, finalize(layer.to_product(), target, eye))
    return layer


@torch.no_grad()
def _set_values(layer: FactorizedLinear, product: FactorProduct) -> None:
    for module, factor in zip(layer.chain, product.factors, strict=True):
        module.values.copy_(factor.values)
