"""Products of sparse factors as one autograd operation, using the kernels on the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matfact._threads import allowed_threads
from matfact.kernels import gradients
from matfact.torch.layers._chain import apply_factors
from matfact.torch.layers._factors import FactorModule, KroneckerFactorModule, SparseFactorModule
from matfact.torch.layers._pool import run

_WORK = 1 << 24  #: minimum work (values times samples) per thread


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
        X, steps = _samples(x), _steps(chain, values)
        # A copy: autograd does not allow writing to a view returned by an operation.
        result = x.new_empty(*x.shape[:-1], chain[0].rows)
        out = _samples(result)
        parts = _parts(len(X), values)
        run([partial(gradients.forward, steps, X[part], out[part]) for part in parts])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *values = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are needed
            return _by_torch(ctx.chain, x, values, grad)
        X, G = _samples(x), _samples(grad)
        out = np.empty_like(X)
        calls, collected = [], []
        for part in _parts(len(X), values):
            collected.append([torch.zeros_like(v) for v in values])
            steps = _steps(ctx.chain, values, collected[-1])
            calls.append(partial(gradients.backward, steps, X[part], G[part], out[part]))
        run(calls)
        first, *others = collected
        for other in others:
            torch._foreach_add_(first, other)
        return torch.from_numpy(out).reshape(x.shape), None, *first


def _by_torch(
    chain: Sequence[FactorModule], x: Tensor, values: Sequence[Tensor], grad: Tensor
) -> Any:
    """Return the gradients by differentiable operations."""
    inputs = [t for t in (x, *values) if t.requires_grad]
    found = iter(torch.autograd.grad(apply_factors(chain, x), inputs, grad, create_graph=True))
    of_x, *of_values = [next(found) if t.requires_grad else None for t in (x, *values)]
    return of_x, None, *of_values


def _parts(n_samples: int, values: Sequence[Tensor]) -> list[slice]:
    """Return the samples of each thread."""
    work = n_samples * sum(v.numel() for v in values)
    count = max(1, min(torch.get_num_threads(), allowed_threads(), work // _WORK))
    ends = [n_samples * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


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
