"""Torch's products with 2:4 values: at most two in each four neighbours of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.sparse import to_sparse_semi_structured

from matfact.torch.kernels.roads import refuses_semi_structured
from matfact.torch.layers._derived import Derived
from matfact.torch.layers._gpu import Target


class SemiStructured(Derived[Tensor | None]):
    """Compressed values of a sparse factor, used in eval mode. Copies and pickles start empty."""

    def __init__(self) -> None:
        super().__init__()
        self.relocate()

    def relocate(self) -> None:
        """Forget what was found about the positions."""
        self.clear()
        self._is_two_four: bool | None = None
        self.refusal: str | None = None  #: what torch said when it could not compress the values

    @property
    def remark(self) -> str:
        """What the representation of a factor says of its 2:4 values."""
        if self.refusal is not None:
            return f", not applied as 2:4 values: {self.refusal}"
        is_used = self._kept is not None and self._kept[1] is not None
        return ", applied as 2:4 values" if is_used else ""

    def suits(self, module: Any, target: Target) -> bool:
        """Whether torch has a product with the values of `module` on a GPU."""
        if module.training or self.refusal is not None or torch.compiler.is_compiling():
            return False
        shape = module.rows, module.columns
        if refuses_semi_structured(*shape, target.name, target.capability) is not None:
            return False
        if self._is_two_four is None:
            mask = module.mask
            if mask.is_meta or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
                return False
            self._is_two_four = is_two_four(mask.numpy(force=True), shape)
        return self._is_two_four

    def apply(self, module: Any, x: Tensor) -> Tensor | None:
        """Return the product with `x`; None if torch cannot compress the values."""
        values, positions = [module.values], [module.mask]
        compressed = self.get(values, lambda _: self._compress(module), positions)
        if compressed is None:
            return None
        samples = x.reshape(-1, module.columns)  # torch cannot flatten transposed ones
        return functional.linear(samples, compressed).reshape(*x.shape[:-1], module.rows)

    def _compress(self, module: Any) -> Tensor | None:
        try:
            return to_sparse_semi_structured(module.dense().detach())
        except (NotImplementedError, RuntimeError, ValueError) as error:
            self.refusal = str(error)
            return None


def is_two_four(bits: np.ndarray, shape: tuple[int, int]) -> bool:
    """Whether a mask of one bit an entry has at most two values in each four of a row."""
    if shape[1] % 4:
        return False
    # Rows of four have one half of a byte each.
    halves = np.concatenate([bits >> 4, bits & 15])
    counts = np.array([number.bit_count() for number in range(16)])
    return bool((counts[halves] <= 2).all())
