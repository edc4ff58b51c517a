"""Tensors derived from parameters, kept while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class DerivedTensor:
    """A tensor computed from the parameters of a module, anew after each change of them.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._tensor: Tensor | None = None

    def get(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor | None:
        """Return the tensor, or None where it cannot be kept.

        That is where gradients are wanted, in traced and transformed code, and in code that has
        replaced the parameters by tensors of its own.
        """
        parameters = tuple(module.parameters())
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return None
        # The version counts changes in place; moves and loads replace the storage.
        key = tuple((p.data_ptr(), p._version, p.device, p.dtype) for p in parameters)
        if key != self._key or self._tensor is None:
            with torch.inference_mode(False), torch.no_grad():
                self._tensor = compute().detach()
            self._key = key
        return self._tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivedTensor:
        return DerivedTensor()

    def __reduce__(self) -> tuple[type[DerivedTensor], tuple[()]]:
        return DerivedTensor, ()
