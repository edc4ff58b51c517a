"""Roads of factors on a GPU: where kernels can be used, and how fast each is predicted to be."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matfact.operators import Advice
from matfact.operators._dispatch.advice import Method, measure
from matfact.torch.kernels import operators, roads
from matfact.torch.kernels.roads import Road
from matfact.torch.layers._derived import is_untransformed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  #: dtypes of the kernels
#: Values from which places would not fit the kernels' integers.
_TOO_MANY = 1 << 31


class Target(NamedTuple):
    """A GPU and the numbers that it multiplies."""

    dtype: torch.dtype
    capability: tuple[int, int]  #: compute capability

    @property
    def name(self) -> str:
        """Name of the dtype."""
        return str(self.dtype).removeprefix("torch.")


def is_capability(given: Any) -> bool:
    """Whether `given` is a compute capability, as torch gives it."""
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and all(isinstance(number, Integral) for number in given)
    )


def measured(layer: Any, x: Tensor) -> Advice:
    """Return the times of a layer for samples `x` by its factors and by its dense product."""

    def by(method: Method, columns: Tensor) -> Any:
        layer.inference = method
        return layer(columns.T)

    return measure(functools.partial(by, "factors"), functools.partial(by, "dense"), x.T)


class GpuRoads(NamedTuple):
    """How a layer is applied to a batch on a GPU in eval mode, as a fixed rule predicts.

    Attributes
    ----------
    batch_size : int
        Number of samples.
    factors : tuple of str
        The road of each factor, from the first on: ``"tiles"`` and ``"rows"`` are Triton kernels,
        which read bit masks, codes or signs, or compressed rows; ``"semi-structured"`` is torch's
        product with 2:4 values, ``"cusparse"`` that with compressed rows; ``"torch"`` makes
        scattered values dense, or multiplies batches of blocks.
    factors_seconds, dense_seconds : float
        Predicted time of the factors, and of the cached dense product.
    method : {"factors", "dense"}
        The faster of the two, which the layer takes unless it has been tuned.
    """

    batch_size: int
    factors: tuple[str, ...]
    factors_seconds: float
    dense_seconds: float
    method: Method


def takes_kernels(x: Tensor, *values: Tensor) -> bool:
    """Whether roads for GPUs may be taken for `x` and factors with the given values."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and all((v.dtype, v.device) == (x.dtype, x.device) for v in values)
        and all(v.numel() < _TOO_MANY for v in values)
        and not torch.is_autocast_enabled("cuda")
        and not torch.jit.is_tracing()
        and (torch.compiler.is_compiling() or (x.numel() > 0 and is_untransformed(x)))
    )


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient of one of the tensors is needed."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def target_of(x: Tensor) -> Target:
    """Return the GPU that `x` is on, with its dtype."""
    return Target(x.dtype, torch.cuda.get_device_capability(x.device))


def available(times: Mapping[Road, float], target: Target) -> dict[Road, float]:
    """Return the times of the roads that this installation has."""
    if operators.has_kernels(target.capability):
        return dict(times)
    return {road: time for road, time in times.items() if road in ("torch", "semi-structured")}


def road_for(module: Any, x: Tensor, *values: Tensor) -> Road:
    """Return the road of a factor for samples `x`; torch if a gradient is needed.

    In compiled graphs, where the number of samples may be symbolic, the kernels' operators choose.
    """
    if not takes_kernels(x, *values) or needs_gradient(x, *values):
        return "torch"
    if torch.compiler.is_compiling():
        return "tiles" if operators.HAS_TRITON else "torch"
    return roads.quickest(module.gpu_times(x.numel() // module.columns, target_of(x)))


def takes_blocks(values: Tensor, X: Tensor) -> bool:
    """Whether a kernel applies a Kronecker-sparse factor to the columns of `X`, as above."""
    if not (operators.HAS_TRITON and takes_kernels(X, values)):
        return False
    if torch.compiler.is_compiling():
        return True
    a, d, b, c = values.shape
    times = roads.blocks((a, d, b, c), X.shape[1], X.itemsize)
    return roads.quickest(available(times, target_of(X))) != "torch"


def predicted(
    chain: Sequence[Any], samples: int, target: Target, checked: int, in_graph: bool = False
) -> GpuRoads:
    """Return the roads of a chain of factors, and whether its cached dense product is faster.

    To use that product, `checked` tensors are compared with their copies first.
    """
    times = [factor.gpu_times(samples, target) for factor in chain]
    taken = tuple(map(roads.quickest, times))
    by_factors = sum(time[road] for time, road in zip(times, taken, strict=True))
    dense = roads.dense(chain[0].rows, chain[-1].columns, samples, target.dtype.itemsize)
    if not in_graph:
        by_factors = max(by_factors, sum(roads.HOST[road] for road in taken))
        dense = max(dense, roads.HOST["torch"]) + checked * roads.COMPARING
    method: Method = "factors" if by_factors <= dense else "dense"
    return GpuRoads(samples, taken, by_factors, dense, method)


def method_for(
    chain: Sequence[Any], x: Tensor, values: Sequence[Tensor], usual: Method, checked: int
) -> Method:
    """Return how a chain of factors is applied to samples `x` on their GPU in eval mode.

    Where no road is known, that is the `usual` method.
    """
    if not takes_kernels(x, *values) or needs_gradient(x, *values):
        return usual
    return predicted(chain, x.numel() // x.shape[-1], target_of(x), checked).method
