"""Products of sparse factors as one operation of autograd, by kernels on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matfact.kernels import gradients
from matfact.torch._factors import (
    FactorModule,
    KroneckerFactorModule,
    SparseFactorModule,
    apply_factors,
)


def apply_fused(chain: Sequence[FactorModule], x: Tensor) -> Tensor:
    """Apply a product of sparse factors to the last axis of `x`."""
    held = [factor._parameters for factor in chain]
    out: Tensor = _Product.apply(x, chain, *(p["values"] for p in held if "values" in p))
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Sequence[FactorModule], *values: Tensor) -> Tensor:
        ctx.chain = chain
        ctx.save_for_backward(x, *values)
        out = gradients.forward(_steps(chain, values), _samples(x))
        return torch.from_numpy(out).reshape(*x.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *values = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients are wanted
            return _by_torch(ctx.chain, x, values, grad)
        collected = [torch.zeros_like(v) for v in values]
        steps = _steps(ctx.chain, values, collected)
        back = gradients.backward(steps, _samples(x), _samples(grad))
        return torch.from_numpy(back).reshape(x.shape), None, *collected


def _by_torch(
    chain: Sequence[FactorModule], x: Tensor, values: Sequence[Tensor], grad: Tensor
) -> Any:
    """Return the gradients by differentiable operations."""
    inputs = [t for t in (x, *values) if t.requires_grad]
    found = iter(torch.autograd.grad(apply_factors(chain, x), inputs, grad, create_graph=True))
    of_x, *of_values = [next(found) if t.requires_grad else None for t in (x, *values)]
    return of_x, None, *of_values


def _samples(x: Tensor) -> np.ndarray:
    samples: np.ndarray = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    return samples


def _steps(
    chain: Sequence[FactorModule], values: Sequence[Tensor], collected: Sequence[Tensor] = ()
) -> np.ndarray:
    """Return the table of steps for the kernels."""
    pairs = iter(zip(values, collected or values, strict=True))
    steps = []
    for factor in chain:
        pattern, positions = (0, 0, 0, 0), (0, 0)
        if isinstance(factor, KroneckerFactorModule):
            kind = gradients.KRONECKER
            a, d, b, c = factor._parameters["values"].shape  # type: ignore[union-attr]
            pattern = (a, b, c, d)
        elif isinstance(factor, SparseFactorModule):
            kind, positions = (
                gradients.CSR,
                (_address(factor, "indptr"), _address(factor, "indices")),
            )
        else:
            kind, positions = gradients.SELECTION, (0, _address(factor, "index"))
        held = (0, 0) if kind == gradients.SELECTION else (t.data_ptr() for t in next(pairs))
        steps.append((kind, factor.rows, factor.columns, *held, *positions, *pattern))
    return np.array(steps[::-1], np.int64)


def _address(factor: FactorModule, buffer: str) -> int:
    tensor = factor._buffers[buffer]
    assert tensor is not None
    return tensor.data_ptr()
