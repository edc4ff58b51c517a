"""Training of a compressed block until it gives what the dense block gave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.training._values import adam, first_tensor, relative_errors, stored_values

#: Learning rate relative to the root mean square of each parameter.
RATE = 0.01
#: Steps of a training, about; bounds of the number of passes over the batches.
STEPS, FEWEST, MOST = 200, 8, 40
#: Passes without improvement after which the training ends.
PATIENCE = 4


@dataclasses.dataclass(frozen=True)
class Matched:
    """Result of the training of a block.

    Attributes
    ----------
    block : str
        Its name.
    before, after : float or None
        Error of its outputs in held-out batches, relative to the outputs in the dense network; None
        if the block could not be trained.
    note : str
        Why it could not be trained.
    """

    block: str
    before: float | None = None
    after: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A batch that waits before a block.

    Attributes
    ----------
    output : callable
        Returns the block's output, with or without gradients.
    target : Tensor
        The block's output in the dense network.
    batch : object
        The network's input.
    is_aside : bool
        Whether it is held out.
    """

    output: Callable[..., Any]
    target: Tensor
    batch: Any
    is_aside: bool


def match_block(name: str, model: nn.Module, examples: Sequence[Example]) -> Matched:
    """Train the stored values, biases and norms of a block, and keep the best state.

    Supports stay as they are. Each output, a token or an image, counts by its relative error.
    Held-out batches decide how long the training goes on: their error does not grow.

    Parameters
    ----------
    name : str
        Name of the block.
    model : torch.nn.Module
        The network; the block is changed in place.
    examples : sequence of Example
        Waiting batches.
    """
    parameters = trained(name, model)
    if note := _reason(parameters, examples):
        return Matched(name, note=note)
    fitted = [each for each in examples if not each.is_aside]
    aside = [each for each in examples if each.is_aside]
    required = [parameter.requires_grad for parameter in parameters]
    best, state = _error(aside, model), _copies(parameters)
    before = best
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        if not _loss(fitted[0], model).requires_grad:
            return Matched(name, note="its outputs have no gradients")
        waited = 0
        for _ in _epochs(parameters, fitted, model):
            error = _error(aside, model)
            waited = 0 if error < best else waited + 1
            if error < best:
                best, state = error, _copies(parameters)
            if waited == PATIENCE or not math.isfinite(error):
                break
    finally:
        with torch.no_grad():
            for parameter, values, was in zip(parameters, state, required, strict=True):
                parameter.copy_(values)
                parameter.grad = None
                parameter.requires_grad_(was)
    return Matched(name, before, best)


def _reason(parameters: Collection[Tensor], examples: Sequence[Example]) -> str:
    """Return why a block cannot be trained, "" if it can."""
    if not parameters:
        return "it stores no values that may be trained (requires_grad)"
    if any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
        return "its values are not in single or double precision"
    if len({each.is_aside for each in examples}) < 2:
        return "it needs at least two batches, one of them held out"
    return ""


def trained(name: str, model: nn.Module) -> list[nn.Parameter]:
    """Return the stored values, biases and norms of a block that no other block uses.

    What is frozen in a network that is not frozen as a whole is left out.
    """
    block = model.get_submodule(name)
    inside = {id(p) for p in block.parameters()}
    elsewhere = {
        id(p)
        for path, module in model.named_modules(remove_duplicate=False)
        if path != name and not path.startswith(f"{name}.")
        for p in module.parameters(recurse=False)
    }
    is_frozen = not any(p.requires_grad for p in model.parameters())
    own = [p for p in stored_values(block) if id(p) in inside - elsewhere]
    return [p for p in own if p.requires_grad or is_frozen]


def _epochs(
    parameters: Sequence[nn.Parameter], examples: Sequence[Example], model: nn.Module
) -> Iterator[int]:
    """Pass over the examples again and again, with learning rates that fall to zero."""
    n_epochs = min(MOST, max(FEWEST, math.ceil(STEPS / len(examples))))
    optimizer, schedule = adam(parameters, RATE, n_epochs * len(examples))
    for epoch in range(n_epochs):
        for example in examples:
            optimizer.zero_grad()
            _loss(example, model).backward()
            optimizer.step()
            schedule.step()
        yield epoch


def _loss(example: Example, model: nn.Module) -> Tensor:
    """Return the mean squared error of the outputs, each relative to its size."""
    output = first_tensor(example.output(gradients=True))
    return relative_errors(output, example.target, example.batch, model).mean()


@torch.no_grad()
def _error(examples: Sequence[Example], model: nn.Module) -> float:
    """Return the relative error of the outputs over all examples."""
    outputs = (first_tensor(each.output(gradients=False)) for each in examples)
    errors = [
        relative_errors(output, each.target, each.batch, model).double()
        for output, each in zip(outputs, examples, strict=True)
    ]
    return math.sqrt(float(torch.cat(errors).mean()))


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def summary(results: Sequence[Matched]) -> str:
    """Return a line for a report."""
    pairs = [(r.before, r.after) for r in results if r.before is not None and r.after is not None]
    said = f"{len(pairs)} of {len(results)} blocks matched"
    if not pairs:
        return said
    before, after = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{said} (mean held-out error of outputs {before:.4f} → {after:.4f})"
