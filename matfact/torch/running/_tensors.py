"""Tensors in networks, and in batches and outputs of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_P = ParamSpec("_P")
_T = TypeVar("_T")


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in `value`, in containers or attributes of objects.

    Includes numbers, and the samples of nested tensors one by one.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else [value]
    elif isinstance(value, (bool, int, float, complex)):
        yield torch.tensor(value)
    elif id(value) not in seen and not isinstance(value, (str, nn.Module)):
        seen.add(id(value))
        if isinstance(value, Mapping):
            value = list(value.values())
        elif not isinstance(value, (list, tuple, set)):
            value = list(getattr(value, "__dict__", {}).values())
        for item in value:
            yield from tensors_in(item, seen)


def samplewise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function` to `x`, or to each of its samples if it is nested."""
    if not x.is_nested:
        return function(x)
    return torch.nested.as_nested_tensor(
        [function(sample) for sample in x.unbind()], layout=x.layout
    )


def is_filled(batch: Any) -> bool:
    """Whether a batch holds samples."""
    return any(tensor.numel() for tensor in tensors_in(batch))


def first_filled(batches: Iterable[Any]) -> Any:
    """Return the first non-empty batch; `batches` must be iterable more than once."""
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches must be iterable more than once, like a list or a DataLoader, got a "
            f"{type(batches).__name__}."
        )
    for batch in batches:
        if is_filled(batch):
            return batch
    raise ValueError("batches must hold at least one batch with samples, got none.")


def outside_inference_mode(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run `function` outside of inference mode, so that its results can be trained."""

    @functools.wraps(function)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        tracked = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(tracked):
            return function(*args, **kwargs)

    return outside


def check_trainable(model: nn.Module) -> None:
    """Raise ``ValueError`` if a parameter was created in inference mode: it cannot be trained."""
    made = next((name for name, each in model.named_parameters() if each.is_inference()), None)
    if made is not None:
        raise ValueError(
            f"model must be created outside torch.inference_mode(), but {made!r} was created "
            "inside and cannot be trained: copy the network outside, with copy.deepcopy."
        )
