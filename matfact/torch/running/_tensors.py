"""Tensors in networks, and in batches and outputs of any kind."""

from __future__ import annotations

import functools
import itertools
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


def output_tensor(output: Any) -> Tensor:
    """Return the tensor in a network's output: logits, hidden states, or the first with samples.

    A loss, which networks return first if they get labels, is not one.
    """
    for name in ("logits", "last_hidden_state"):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return named
    found = next(numeric_tensors(output, least=1), None)
    if found is None:
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            "model must return a tensor of real or complex numbers with an axis of samples, but "
            f"its output, a {kind}, holds none."
        )
    return found


def numeric_tensors(value: Any, least: int) -> Iterator[Tensor]:
    """Yield the tensors in `value` of real or complex numbers with at least so many axes."""
    if isinstance(value, Tensor):
        is_number = value.is_floating_point() or value.is_complex()
        yield from [value] if is_number and value.ndim >= least else []
    elif hasattr(value, "values") and callable(value.values):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(numeric_tensors(each, least) for each in value)
