"""Gradual magnitude pruning during training."""

from __future__ import annotations

import torch
from torch import nn

from matfact.torch.pruning._masks import (
    Predicate,
    check_weights,
    collapsed_layers,
    prunable_parameters,
)
from matfact.torch.pruning._prune import Scope, _check, prune_lowest_magnitudes


class GradualMagnitude:
    """Prune gradually during training: fast at first, slowly at the end.

    The share of kept weights falls from 1 to `keep` along the cubic schedule of Zhu & Gupta (2018).

    Parameters
    ----------
    model : torch.nn.Module
        The network in training, changed in place. The optimizer may be created before or after,
        since parameters stay the same objects.
    keep : float
        Final share of weights to keep, in (0, 1].
    steps : int
        Optimizer steps from the first pruning to the last.
    every : int, default=100
        Optimizer steps between prunings.
    start : int, default=0
        Optimizer steps before the first pruning.
    scope : {"layer", "global"}, default="layer"
        Whether each layer keeps the same share, as published, or weights of all layers compete.
    prunable : callable, optional
        See `prunable_parameters`.

    References
    ----------
    - M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
      model compression", ICLR workshop 2018.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch.pruning import GradualMagnitude
    >>> model = torch.nn.Linear(10, 10)
    >>> pruner = GradualMagnitude(model, keep=0.1, steps=4, every=1)
    >>> for _ in range(5):  # after each step of the optimizer
    ...     pruner.step()
    ...     print(int(model.weight.count_nonzero()))
    100
    47
    21
    11
    10
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float,
        steps: int,
        *,
        every: int = 100,
        start: int = 0,
        scope: Scope = "layer",
        prunable: Predicate | None = None,
    ) -> None:
        _check("magnitude", keep, scope, None)
        for name, value, least in (("steps", steps, 1), ("every", every, 1), ("start", start, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.keep, self.steps, self.every, self.start = keep, steps, every, start
        self.scope: Scope = scope
        self._parameters = prunable_parameters(model, prunable)
        check_weights(self._parameters)
        self._n_steps = 0
        for parameter in self._parameters:
            _ = parameter.mask  # create masks now, before the optimizer

    def share(self, step: int) -> float:
        """Return the share of weights to keep after `step` optimizer steps."""
        left = 1.0 - min(max(step - self.start, 0), self.steps) / self.steps
        return self.keep + (1.0 - self.keep) * left**3

    @torch.no_grad()
    def step(self) -> None:
        """Prune if it is due; call after every optimizer step."""
        step, self._n_steps = self._n_steps, self._n_steps + 1
        last = self.start + self.steps
        if step < self.start or step > last or ((step - self.start) % self.every and step < last):
            return
        prune_lowest_magnitudes(self._parameters, self.share(step), self.scope)
        if step == last:
            collapsed_layers(self._parameters)
