"""Train a compressed network further: supports stay as they are, values learn."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn import functional

from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._batches import checked, device_of, eval_mode, forward, moved
from matfact.torch.running._tensors import check_trainable, outside_inference_mode

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
        The epoch, from 1, whose network was kept, or 0 for the network as it was given: the last
        one without `validate`.
    first_score : float or None
        What `validate` returned before the first epoch.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    first_score: float | None = None


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
        Score of the network, in eval mode; higher is better. It is called before the first epoch
        and after each. A score that is NaN is worse than any other.
    patience : int, optional
        Stop after this many epochs without a better score.
    progress : callable, optional
        Called after each epoch with its number, its mean loss and its score.

    Returns
    -------
    FineTuning
        Losses and scores. The network ends in the mode it had. With `validate`, also where
        training fails, it ends in the best state seen, buffers and the state before the first
        epoch included.

    Raises
    ------
    ValueError
        If a loss or a trained parameter becomes infinite or NaN without `validate`, with which
        this is a warning that training ends; if `validate` returns nothing but NaN.
    """
    check_trainable(model)
    if loss is None and teacher is None:
        raise ValueError("loss must be given where there is no teacher, got None for both.")
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must lie between 0 and 1, got {distillation}.")
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches must be a collection for {epochs} epochs, got a {type(batches).__name__}, "
            "which can be used once: make a list of it."
        )
    if patience is not None and validate is None:
        raise ValueError(f"patience needs validate, got patience={patience} without it.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}.")
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective = _objective(loss, teacher, distance, distillation)
    result = FineTuning()
    with eval_mode(model):  # in which each module has its own mode again after
        best = None if validate is None else _Best(model, validate, result)
        try:
            for epoch in range(1, epochs + 1):
                result.losses.append(_train(model, batches, optimizer, schedule, objective, epoch))
                if best is None:
                    result.best_epoch = epoch
                else:
                    best.look(epoch)
                if progress is not None:
                    score = None if best is None else result.scores[-1]
                    progress(epoch, result.losses[-1], score)
                if patience is not None and epoch - result.best_epoch >= patience:
                    break
        except DivergenceError as error:
            if best is None:
                raise
            message = f"Training ends, and the best network is kept: {error}"
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        finally:
            if best is not None:
                best.restore()
    if best is not None and math.isnan(best.score):
        raise ValueError("validate must return a number, got NaN for the network in every state.")
    return result


class _Best:
    """The best state of a network in training, from before the first epoch on."""

    def __init__(
        self, model: nn.Module, validate: Callable[[nn.Module], float], result: FineTuning
    ) -> None:
        self._model, self._validate, self._result = model, validate, result
        result.first_score = self.score = float(validate(model))
        self._state = copy.deepcopy(model.state_dict())

    def look(self, epoch: int) -> None:
        """Take the network as it is after an epoch if it is better than all before."""
        score = float(self._validate(self._model.eval()))
        self._result.scores.append(score)
        if score > self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.score, self._result.best_epoch = score, epoch
            self._state = copy.deepcopy(self._model.state_dict())

    def restore(self) -> None:
        """Give the network its best state back."""
        self._model.load_state_dict(self._state)


class DivergenceError(ValueError):
    """Training has broken a network."""


def check_finite(model: nn.Module, when: str) -> None:
    """Refuse a network that has been trained until it broke."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise DivergenceError(
                f"training must keep parameters finite, but {when} {name!r} has values that are "
                "not: a lower learning rate may help."
            )


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


def _train(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    objective: Callable[[Any, Any], Tensor],
    epoch: int,
) -> float:
    """Take a step of the optimizer with each batch and return the mean of the losses before."""
    model.train()
    losses = []
    for number, batch in enumerate(checked(batches), 1):
        batch = moved(batch, device_of(model))
        loss = objective(forward(model, batch), batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise DivergenceError(
                f"loss must be finite, got {losses[-1]} for batch {number} of epoch {epoch}."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    check_finite(model, f"after epoch {epoch}")
    return math.fsum(losses) / len(losses)


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


@outside_inference_mode
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


@outside_inference_mode
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
