"""The training loop: epochs, and the best state of a network."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from matfact._progress import Bar, Step
from matfact.torch.running._batches import checked, device_of, eval_mode, forward, moved


@dataclasses.dataclass
class FineTuning:
    """Record of a fine-tuning.

    Attributes
    ----------
    losses : list of float
        Mean training loss of each epoch.
    scores : list of float
        Result of `validate` after each epoch, if given.
    best_epoch : int
        Epoch of the final network, from 1, or 0 for the initial network. Without `validate`, the
        last epoch.
    first_score : float or None
        Result of `validate` before the first epoch.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    first_score: float | None = None


def train(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    *,
    epochs: int,
    validate: Callable[[nn.Module], float] | None,
    patience: int | None,
    bar: Bar,
    training: bool = True,
    retreat: Callable[[], None] | None = None,
) -> FineTuning:
    """Train a network, and keep its best epoch; see `fine_tune`.

    Parameters
    ----------
    objective : callable
        Loss of an output and its batch.
    training : bool, default=True
        Whether the network trains in training mode, or in eval mode, without dropout.
    retreat : callable, optional
        Called once the best state is restored, after each epoch without a better score. By default
        training goes on from the state that it has.
    """
    result = FineTuning()
    bar.expect([("", epochs)], epochs)
    with bar, eval_mode(model), torch.enable_grad():  # restores the mode of each module
        best = None if validate is None else _Best(model, validate, result)
        try:
            for epoch in range(1, epochs + 1):
                model.train(training)
                try:
                    loss = _epoch(model, batches, optimizer, schedule, objective, epoch)
                except DivergenceError as error:
                    if retreat is None:
                        raise
                    _warn(f"Training goes back to the best network: {error}")
                    loss = math.nan
                result.losses.append(loss)
                if best is None:
                    result.best_epoch = epoch
                elif not best.look(epoch) and retreat is not None:
                    best.restore()
                    retreat()
                score = None if best is None else result.scores[-1]
                step = Step(f"epoch {epoch}: loss {result.losses[-1]:.4g}")
                bar.advance(step, epoch, result.losses[-1], score)
                if patience is not None and epoch - result.best_epoch >= patience:
                    break
        except DivergenceError as error:
            if best is None:
                raise
            _warn(f"Training stops, and the best network is kept: {error}")
        finally:
            if best is not None:
                best.restore()
    if best is not None and math.isnan(best.score):
        raise ValueError("validate must return a number, got NaN for every state of the network.")
    return result


def _warn(message: str) -> None:
    warnings.warn(message, ConvergenceWarning, stacklevel=5)


class _Best:
    """The best state of a network in training, including its initial state."""

    def __init__(
        self, model: nn.Module, validate: Callable[[nn.Module], float], result: FineTuning
    ) -> None:
        self._model, self._validate, self._result = model, validate, result
        result.first_score = self.score = float(validate(model))
        self._state = copy.deepcopy(model.state_dict())

    def look(self, epoch: int) -> bool:
        """Save the network after an epoch if it is better than before, and return whether it is."""
        score = float(self._validate(self._model.eval()))
        self._result.scores.append(score)
        is_better = score > self.score or (math.isnan(self.score) and not math.isnan(score))
        if is_better:
            self.score, self._result.best_epoch = score, epoch
            self._state = copy.deepcopy(self._model.state_dict())
        return is_better

    def restore(self) -> None:
        """Restore the best state of the network."""
        self._model.load_state_dict(self._state)


class DivergenceError(ValueError):
    """Training has made a network non-finite."""


def check_finite(model: nn.Module, when: str) -> None:
    """Raise if a network has non-finite parameters after training."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise DivergenceError(
                f"training must keep parameters finite, but {when} {name!r} has infinite or NaN "
                "values: a lower learning rate may help."
            )


def _epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    objective: Callable[[Any, Any], Tensor],
    epoch: int,
) -> float:
    """Take an optimizer step with each batch, and return the mean loss."""
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
