"""Linear layers with a factorized weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact._checks import check_positive_int
from matfact.backend import to_numpy
from matfact.operators import Advice, FactorProduct
from matfact.torch.layers._chain import apply_factors, dense_product, factor_module
from matfact.torch.layers._derived import Copy, Derived, is_plain, is_untransformed
from matfact.torch.layers._factors import DenseFactorModule, FactorModule
from matfact.torch.layers._gpu import (
    DTYPES,
    GpuRoads,
    Method,
    Target,
    is_capability,
    measured,
    method_for,
    predicted,
)
from matfact.torch.layers._in_place import InPlace, are_dense_codes
from matfact.torch.layers._inference import Inference, InferenceModule, check_tensor
from matfact.torch.layers._pool import on_torch_threads
from matfact.torch.layers._pretrained import refuse_unattached
from matfact.torch.running._batches import eval_mode
from matfact.torch.running._offloaded import fetched

if TYPE_CHECKING:
    from matfact.factorizers import BaseFactorizer

_DTYPES = (torch.float32, torch.float64)  #: dtypes of the kernels


class FactorizedLinear(InferenceModule):
    """Linear layer ``x ↦ x (F_1 F_2 … F_Q)ᵀ + bias``, a replacement of `torch.nn.Linear`.

    Values are parameters and positions are buffers, so any optimizer trains the values on a fixed
    support. Of quantized values the scales are parameters, and the codes, one byte each, are
    buffers; signs take one bit and are not trained. Copying, saving, compiling and exporting work
    as for any module. On the CPU, compiled kernels compute products of sparse factors and their
    gradients.

    Parameters
    ----------
    product : FactorProduct
        NumPy or torch factors.
    bias : Tensor, optional
        Bias of shape (out_features,); copied.
    inference : {"auto", "dense", "factors"}, default="auto"
        How the layer is applied in eval mode if no gradient is needed. "dense" caches the dense
        product, which is as fast and as large as the original layer. "factors" caches nothing.
        "auto" takes the fastest. On the CPU these are the kernels of
        `matfact.operators.FactorProduct`, which cache reordered values, or torch with the
        dense product wherever that class would use it too. On a GPU it caches the dense product
        where that is predicted or timed to be faster, see `gpu_roads` and `tune`; elsewhere if the
        factors take more work. The values are compared with a copy in every pass to detect changes,
        see `keep_unchecked`, unless the CPU reads the factors as they are stored.
    copy : bool, default=True
        Whether the values of the factors are copied.

    Attributes
    ----------
    factors : torch.nn.ModuleList
        One module per factor, applied from last to first.
    bias : torch.nn.Parameter or None
        The bias.
    in_features, out_features : int
        Number of inputs and outputs.
    """

    def __init__(
        self,
        product: FactorProduct,
        bias: Tensor | None = None,
        *,
        inference: Inference = "auto",
        copy: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = product.shape
        self.factors = nn.ModuleList(factor_module(factor, copy) for factor in product.factors)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.inference = inference
        self._product: Derived[Tensor] = Derived()
        self._host: Derived[_Host] = Derived()
        self._in_place = InPlace()
        self._tuned: dict[int, Method] = {}  # by number of samples

    @classmethod
    def from_linear(
        cls, linear: nn.Module, factorizer: BaseFactorizer, *, calibration: Any = None
    ) -> FactorizedLinear:
        """Factorize the weight of a layer with ``weight`` and ``bias``.

        Parameters
        ----------
        linear : torch.nn.Module
            The trained layer, which is not changed.
        factorizer : BaseFactorizer
            Estimator to fit to the weight.
        calibration : array or InputStatistics, optional
            Inputs of the layer, or their statistics, for factorizers that use them.
        """
        weight: Any = linear.weight
        matrix = to_numpy(weight) if weight.device.type == "cpu" else weight.detach()
        product = factorizer.fit(matrix, calibration=calibration).operator_
        bias: Any = linear.bias
        layer = FactorizedLinear(product, bias)
        return layer.to(device=weight.device, dtype=weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense product, computed on each access, for code that reads ``weight``."""
        return dense_product(self.chain)

    @property
    def chain(self) -> list[FactorModule]:
        """The factors as a list."""
        return cast(list[FactorModule], list(self.factors))

    def keeps_product(self) -> bool:
        """Whether eval mode uses the dense product instead of the factors."""
        if self.inference != "auto":
            return self.inference == "dense"
        return sum(factor.work for factor in self.chain) >= self.in_features * self.out_features

    def _method(self) -> Method:
        return "dense" if self.keeps_product() else "factors"

    def _method_for(self, x: Tensor, values: list[Tensor]) -> Method:
        """Return what eval mode uses for samples `x`, on a GPU by prediction."""
        if self.inference == "auto" and x.is_cuda:
            tuned = self._tuned.get(x.numel() // self.in_features)
            return tuned or method_for(self.chain, x, values, self._method(), self._checked(values))
        return self._method()

    def _checked(self, values: list[Tensor]) -> int:
        """Tensors that are compared with their copies before the cached product is used."""
        return len(values) + len(self.fixed()) if self._product.is_checked else 0

    def forward(self, input: Tensor) -> Tensor:  # named as torch does, for calls by keyword
        """Apply the layer to the last axis of `input`."""
        x = input
        check_tensor(x)
        if x.is_nested:
            samples = [self(sample) for sample in x.unbind()]
            return torch.nested.as_nested_tensor(samples, layout=x.layout)
        if x.shape[-1:] != (self.in_features,):  # not all kernels would notice
            raise ValueError(
                f"input must have {self.in_features} features in its last axis, got shape "
                f"{tuple(x.shape)}."
            )
        if not self.training and not torch.compiler.is_compiling():
            out = self._infer(x)
            if out is not None:
                return out
        x = self.apply_factors(x)
        # In the dtype of autocast.
        return x if self.bias is None else x + self.bias.to(x.dtype)

    def _infer(self, x: Tensor) -> Tensor | None:
        """Return the output computed from the cache for inference, or None if it cannot be used."""
        if self._is_on_host(x):
            factors: Any = self._modules["factors"]  # faster than by name
            out = self._in_place.apply(factors._modules.values(), x)
            if out is not None:
                bias = self.bias
                out = out if bias is None else out.add_(bias)
                return out if out.dtype is x.dtype else out.to(x.dtype)
        values = self.values()
        if self.inference == "auto" and self._has_kernels(x, values):
            host = self._host.get(values, self._to_host, self.fixed())
            return None if host is None else self._apply_on_host(host, x)
        if self._method_for(x, values) == "dense":
            product = self._product.get(values, lambda _: self.weight.detach(), self.fixed())
            if product is not None:
                return functional.linear(x, product, self.bias)
        return None

    def tune(self, batch_size: int) -> Advice:
        """Time factors and dense product on the layer's GPU, and use the faster for such batches.

        Until then a fixed rule predicts it, see `gpu_roads`. The choice holds in eval mode with
        ``inference="auto"``. Copies of the layer keep it, files do not.

        Parameters
        ----------
        batch_size : int
            Number of samples, at least 1.

        Returns
        -------
        Advice
            Seconds of both, with the time of the host, and whether tuning ``changed`` the method.

        Raises
        ------
        TypeError
            If the layer is not on a GPU. On the CPU its kernels follow a rule of their own.
        """
        n_samples = check_positive_int("batch_size", batch_size)
        held = self.chain[0].values
        if not held.is_cuda:
            raise TypeError(f"tune needs a layer on a GPU, this one is on {held.device}.")
        x = torch.zeros(n_samples, self.in_features, dtype=held.dtype, device=held.device)
        chosen, values = self.inference, self.values()
        with torch.no_grad(), eval_mode(self):
            rule = method_for(self.chain, x, values, self._method(), self._checked(values))
            try:
                advice = measured(self, x)._replace(rule=rule)
            finally:
                self.inference = chosen
        self._tuned[n_samples] = advice.method
        return advice

    def gpu_roads(
        self,
        batch_size: int,
        *,
        capability: tuple[int, int] | None = None,
        in_graph: bool = False,
    ) -> GpuRoads:
        """Return how the layer is applied to a batch on a GPU in eval mode, with predicted times.

        This runs nothing, and needs no GPU. Kernels are among the roads if Triton is installed.
        The times are those of a fixed rule, whose constants no GPU has verified yet.

        Parameters
        ----------
        batch_size : int
            Number of samples.
        capability : tuple of int, optional
            Compute capability of the GPU, on which kernels and 2:4 products depend. By default
            that of the layer's GPU, or (9, 0) if it is on another device.
        in_graph : bool, default=False
            Whether kernels are replayed from a CUDA graph, so that the host takes no time. While a
            graph is captured, no dense product can be cached and no kernel compiled: make the layer
            with ``inference="factors"``, and call it once before with as many samples.

        Examples
        --------
        >>> from matfact.torch import LowRankLinear
        >>> LowRankLinear(4096, 4096, rank=64).gpu_roads(1).method
        'factors'
        """
        n_samples = check_positive_int("batch_size", batch_size)
        held = self.chain[0].values
        if capability is None:
            on_gpu = held.is_cuda
            capability = torch.cuda.get_device_capability(held.device) if on_gpu else (9, 0)
        if not is_capability(capability):
            raise ValueError(f"capability must be two integers such as (9, 0), got {capability!r}.")
        if held.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"the layer's values must be of dtype {names}, got {held.dtype}.")
        target = Target(held.dtype, capability)
        return predicted(self.chain, n_samples, target, self._checked(self.values()), in_graph)

    def _apply_on_host(self, host: _Host, x: Tensor) -> Tensor:
        samples = x.reshape(-1, self.in_features)
        if host.operator.method_for(len(samples)) == "dense":
            # With torch: the thread pools of NumPy and torch would wait for each other.
            return functional.linear(x, host.product, self.bias)
        with on_torch_threads():
            columns = torch.from_numpy(host.operator @ samples.T.resolve_neg().numpy())
        out = columns.T.contiguous().reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out.add_(self.bias)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse_unattached()
        super()._save_to_state_dict(*args, **kwargs)

    def values(self) -> list[Tensor]:
        """Return what is trained: parameters, unless they have been replaced."""
        values: list[Tensor] = []
        for module in self.factors._modules.values():
            factor = cast(FactorModule, module)
            if name := factor.trained:
                # Not by name: every call needs this, and a lookup takes longer than a small
                # product.
                parameter = factor._parameters.get(name)
                values.append(getattr(factor, name) if parameter is None else parameter)
        return values

    def fixed(self) -> list[Tensor]:
        """Return the buffers with the positions, codes and signs of the factors."""
        factors = [cast(FactorModule, module) for module in self.factors._modules.values()]
        return [cast(Tensor, f._buffers[name]) for f in factors for name in f.fixed]

    def _is_on_host(self, x: Tensor) -> bool:
        """Whether `x` holds samples to which a kernel may apply the factors as stored."""
        return (
            # Unchecked layers keep what is faster for several, if anything is.
            (
                x.numel() == self.in_features
                or (x.numel() > 0 and (self._host.is_checked or are_dense_codes(self.chain)))
            )
            and x.is_cpu
            and self.inference == "auto"
            and not torch.is_autocast_enabled("cpu")
            and not torch.jit.is_tracing()
            and is_plain(x)
        )

    def _has_kernels(self, x: Tensor, values: list[Tensor]) -> bool:
        """Whether kernels on the host are faster than torch."""
        return (
            x.device.type == "cpu"
            and x.dtype in _DTYPES
            and any(v.dtype == x.dtype and v.device == x.device for v in values[:1])
            and any(type(module) is not DenseFactorModule for module in self.factors)
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and is_plain(x)
        )

    def _to_host(self, copies: Sequence[Copy]) -> _Host:
        """Return the product with values in read-only NumPy arrays."""
        left, factors = iter(copies), []
        for module in self.chain:
            numbers = next(left).array() if module.trained else None
            factors.append(module.on_host(numbers))
        return _Host(FactorProduct(factors))

    def apply_factors(self, x: Tensor) -> Tensor:
        """Return the output without bias."""
        chain = self.chain
        if self._trains_fused(chain, x):
            # Imported late, so that inference does not load the compiler.
            from matfact.torch.layers._autograd import apply_fused

            return apply_fused(chain, x)
        return apply_factors(chain, x)

    def _trains_fused(self, chain: list[FactorModule], x: Tensor) -> bool:
        """Whether gradients are needed and the kernels compute them faster than torch."""
        return (
            torch.is_grad_enabled()
            and is_untransformed(x)
            and x.device.type == "cpu"
            and x.dtype in _DTYPES
            and x.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and not torch.jit.is_tracing()
            and all(factor.has_gradient_kernel(x) for factor in chain)
        )

    def to_product(self) -> FactorProduct:
        """Return the product of the factors, sharing memory with their values."""
        with fetched(self.factors):
            return FactorProduct([factor.to_factor() for factor in self.chain])

    def to_dense(self) -> nn.Linear:
        """Return the equivalent dense layer."""
        with fetched(self):
            value = self.chain[0].values
            dense = nn.Linear(
                self.in_features, self.out_features, self.bias is not None,
                device=value.device, dtype=value.dtype,
            )  # fmt: skip
            return filled(dense, self)

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, inference={self.inference!r}"
        )


class _Host:
    """Product with read-only NumPy values, and its dense matrix once needed."""

    def __init__(self, operator: FactorProduct) -> None:
        self.operator = operator

    @functools.cached_property
    def product(self) -> Tensor:
        with torch.inference_mode(False):  # so that it can be used outside too
            return torch.from_numpy(np.ascontiguousarray(self.operator.toarray()))


@torch.no_grad()
def filled(dense: Any, layer: Any) -> Any:
    """Return `dense` with the weight, bias and mode of a factorized `layer`."""
    dense.weight.copy_(layer.weight)
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
    return dense.train(layer.training)
