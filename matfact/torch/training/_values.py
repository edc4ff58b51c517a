"""What is trained in a compressed network, how fast, and how outputs are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.layers._factors import FactorModule
from matfact.torch.running._batches import attended
from matfact.torch.running._tensors import numeric_tensors

#: The least root mean square of a parameter that learning rates are relative to.
SMALLEST = 1e-2
#: Divisor of learning rates that were too large.
SLOWER = 4
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


def slow_down(optimizer: torch.optim.Adam, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Divide all learning rates by `SLOWER`, and forget the gradients seen so far."""
    schedule.base_lrs = [rate / SLOWER for rate in schedule.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] /= SLOWER
    optimizer.state.clear()


def relative_errors(output: Tensor, target: Tensor, batch: Any, model: nn.Module) -> Tensor:
    """Return the squared error of each output, a token or a sample, relative to its square.

    Padding does not count. Squares of half precision would overflow, so single is the least.
    """
    found, wanted = (_real(rows(attended(each, batch, model))) for each in (output, target))
    energy = wanted.square().sum(1)
    return (found - wanted).square().sum(1) / (energy + FLOOR * energy.mean() + 1e-30)


def rows(output: Tensor) -> Tensor:
    """Return outputs as rows: tokens, or else samples."""
    if output.ndim == 1:  # a number for each sample
        return output[:, None]
    return output.flatten(0, -2) if output.ndim <= 3 else output.flatten(1)


def _real(x: Tensor) -> Tensor:
    """Return `x` in at least single precision, with the parts of complex numbers as two."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def first_tensor(output: Any) -> Tensor:
    """Return the first floating-point tensor of a module's output."""
    found = next(numeric_tensors(output, least=2), None)
    if found is None:
        raise TypeError(f"no tensor in a {type(output).__name__}")
    return found
