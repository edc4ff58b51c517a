"""What is derived from parameters, kept while those stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")
_thread = threading.local()


def repeat_exactly() -> None:
    """Have layers that this thread calls compute in a way that no measured time has a say in."""
    _thread.is_repeatable = True


def is_repeatable() -> bool:
    """Whether this thread has asked for that."""
    return getattr(_thread, "is_repeatable", False)


def is_plain(x: Tensor) -> bool:
    """Whether nothing but the value of `x` counts: no gradient, tracing or transformation."""
    return is_untransformed(x) and not (x.requires_grad and torch.is_grad_enabled())


def is_untransformed(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor outside of code that is transformed."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether nothing but the values of `parameters` counts: no gradient, tracing or substitute."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if {*map(type, parameters)} != {nn.Parameter}:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


class Derived(Generic[T]):
    """Something computed from the parameters of a module, anew after each change of them.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Keep nothing until it is wanted again."""
        self._key: list[tuple[int, int]] = []
        self._storage: list[Tensor] = []
        self._value: T | None = None

    def get(self, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T | None:
        """Return what `compute` makes of `parameters`, or None where it cannot be kept.

        That is where gradients are wanted, in traced and transformed code, and in code that has
        replaced the parameters by tensors of its own.
        """
        if not are_plain(parameters):
            return None
        try:  # the version counts changes in place; moves and loads replace the storage
            key = [(p.data_ptr(), p._version) for p in parameters]
        except RuntimeError:  # made in inference mode, they do not count
            return None
        if key != self._key or self._value is None:
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            # Held, so that no other storage comes to stand at the same place.
            self._key, self._storage = key, [p.detach() for p in parameters]
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        return Derived, ()


def forget(module: nn.Module) -> None:
    """Let `module` and what is in it keep nothing derived, which takes as much memory as they."""
    for each in module.modules():
        for value in vars(each).values():
            if isinstance(value, Derived):
                value.clear()
