"""Batches of any kind, as a model takes them."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def forward(model: nn.Module, batch: Any) -> Any:
    """Call `model` on a batch, on the device of the model.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : tensor, mapping, tuple or list
        A mapping holds keyword arguments. Of a tuple or list the model gets as many of the first
        entries as its ``forward`` requires, at least one, so that labels behind them are ignored.
    """
    batch = moved(batch, device_of(model))
    if hasattr(batch, "keys"):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _n_required(model)])
    return model(batch)


def attended(x: Tensor, batch: Any) -> Tensor:
    """Return a layer input without the tokens that the batch says are padding.

    Parameters
    ----------
    x : Tensor
        The input of a layer; (samples, tokens, features) where it can hold padding.
    batch : tensor, mapping, tuple or list
        What the network was called with. Padding is where the ``attention_mask`` of a mapping, of
        shape (samples, tokens), is zero.
    """
    if x.ndim != 3 or not hasattr(batch, "keys") or "attention_mask" not in batch.keys():  # noqa: SIM118
        return x
    mask = batch["attention_mask"]
    if tuple(mask.shape) != tuple(x.shape[:2]):
        return x
    return x[mask.to(x.device).bool()]


def _n_required(model: nn.Module) -> int:
    """Return how many positional arguments ``model.forward`` requires, at least one."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """Return `value`, a tensor or containers of tensors, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "keys"):
        return {key: moved(value[key], device) for key in value.keys()}  # noqa: SIM118
    if isinstance(value, (list, tuple)):
        return [moved(item, device) for item in value]
    return value


def checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield `batches`, of which there must be one at least."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError(
            "the batches must hold at least one, got none (an iterator can be used up only once)."
        )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and each module back into its own mode after."""
    # Modules that are replaced meanwhile need not stay in memory.
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for reference, training in modes:
            module = reference()
            if module is not None:
                module.training = training


def as_written() -> contextlib.AbstractContextManager[Any]:
    """Run compiled networks as they are written: what is compiled calls no new hooks."""
    return torch.compiler.set_stance("force_eager")
