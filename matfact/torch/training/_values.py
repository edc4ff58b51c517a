"""What is trained in a compressed network, how fast, and how outputs are compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.layers._factors import FactorModule
from matfact.torch.running._batches import attended, checked
from matfact.torch.running._tensors import tensors_in

#: The least root mean square of a parameter that learning rates are relative to.
SMALLEST = 1e-2
#: Share of the mean square of the outputs that is added to the square of each.
FLOOR = 0.01


def stored_values(module: nn.Module) -> list[nn.Parameter]:
    """Return the stored values, biases and norms of a compressed network or block."""
    found = {
        id(parameter): parameter
        for path, each in module.named_modules()
        for parameter in each.parameters(recurse=False)
        if "parametrizations" not in path.split(".")
        and (isinstance(each, FactorModule) or parameter.ndim == 1)
        and parameter.is_floating_point()
        and parameter.numel()
    }
    return list(found.values())


def adam(
    parameters: Sequence[nn.Parameter], rate: float, n_steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Return Adam with learning rates that fit each parameter and fall to zero, as a cosine.

    Parameters
    ----------
    parameters : sequence of torch.nn.Parameter
        What is trained.
    rate : float
        Learning rate relative to the root mean square of each parameter.
    n_steps : int
        Number of steps until the rates are zero.
    """
    groups = [
        {"params": [p], "lr": rate * max(math.sqrt(p.detach().square().mean()), SMALLEST)}
        for p in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, n_steps) / n_steps))
    )
    return optimizer, schedule


def relative_errors(output: Tensor, target: Tensor, batch: Any, model: nn.Module) -> Tensor:
    """Return the squared error of each output, a token or a sample, relative to its square.

    Padding does not count.
    """
    found, wanted = (rows(attended(each, batch, model)) for each in (output, target))
    energy = _energies(wanted)
    return _energies(found - wanted) / (energy + FLOOR * energy.mean() + 1e-30)


def _energies(outputs: Tensor) -> Tensor:
    """Return the squared norm of each row, in single precision or better."""
    numbers = torch.view_as_real(outputs).flatten(1) if outputs.is_complex() else outputs
    return (numbers.float() if numbers.itemsize < 4 else numbers).square().sum(1)


def rows(output: Tensor) -> Tensor:
    """Return outputs as rows: tokens, or else samples."""
    if output.ndim <= 1:
        return output.reshape(-1, 1)
    return output.flatten(0, -2) if output.ndim <= 3 else output.flatten(1)


def check_outputs(output: Tensor, number: int) -> None:
    """Raise ``ValueError`` if the output for a batch is none that errors can be measured of."""
    if output.ndim == 0 or not (output.is_floating_point() or output.is_complex()):
        raise ValueError(
            f"model must give outputs with an entry for each sample, in floating point, got a "
            f"{output.dtype} of shape {tuple(output.shape)} for batch {number}."
        )


def filled(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the batches that hold samples, with their numbers; raise if there are none."""
    for number, batch in enumerate(checked(batches)):
        if any(tensor.numel() for tensor in tensors_in(batch)):
            yield number, batch


def first_tensor(output: Any) -> Tensor:
    """Return the first floating-point tensor of a module's output."""
    found = next(_tensors(output), None)
    if found is None:
        raise TypeError(f"no tensor in a {type(output).__name__}")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() and value.ndim > 1 else []
    elif hasattr(value, "values") and callable(value.values):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(map(_tensors, value))
