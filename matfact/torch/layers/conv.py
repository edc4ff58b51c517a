"""Convolutions with a factorized kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact.operators import FactorProduct
from matfact.torch.layers._derived import Derived
from matfact.torch.layers._factors import DenseFactorModule, SparseFactorModule
from matfact.torch.layers._inference import Inference, InferenceModule, check_tensor
from matfact.torch.layers.linear import FactorizedLinear, filled
from matfact.torch.running._offloaded import fetched

#: Factors that can be used as filters of a convolution.
_FILTERS = (DenseFactorModule, SparseFactorModule)
#: Cost of reading and writing an activation, in multiplications (measured on a CPU).
_PASS = 100

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class FactorizedConv(InferenceModule):
    """1-D to 3-D convolution with a factorized kernel, a drop-in replacement of the dense layer.

    The kernel of each group, of shape (out, in, *kernel), is the product of shape (out, in ·
    kernel size) of a factorized linear layer. If computing the dense kernel is less work than
    applying the factors at each position, the layer does so. Otherwise, if the last factor is dense
    or sparse, it is applied as a convolution, followed by convolutions of size one. In other cases
    the factors are applied to unfolded patches.

    Parameters
    ----------
    conv : torch.nn.Conv1d, torch.nn.Conv2d or torch.nn.Conv3d
        Provides the geometry and the bias, which is copied.
    kernels : sequence of FactorizedLinear
        One per group, without bias, from the patches of the group to its output channels.
    inference : {"auto", "dense", "factors"}, default="auto"
        As in `FactorizedLinear`.

    Attributes
    ----------
    kernels : torch.nn.ModuleList
        One factorized linear layer per group.
    bias : torch.nn.Parameter or None
        The bias.
    """

    def __init__(
        self,
        conv: Convolution,
        kernels: Sequence[FactorizedLinear],
        *,
        inference: Inference = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(conv, (Convolution, FactorizedConv)):
            raise TypeError(
                "conv must be a Conv1d, Conv2d or Conv3d; transposed convolutions have no "
                f"factorized form, got {type(conv).__name__}."
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = tuple(conv.kernel_size), tuple(conv.stride)
        self.padding, self.dilation = conv.padding, tuple(conv.dilation)
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        self.kernels = nn.ModuleList(kernels)
        self._check_kernels(kernels)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.inference = inference
        self._kernel: Derived[Tensor] = Derived()

    def _check_kernels(self, kernels: Sequence[FactorizedLinear]) -> None:
        columns = self.in_channels // self.groups * math.prod(self.kernel_size)
        expected = [(self.out_channels // self.groups, columns)] * self.groups
        found = [(kernel.out_features, kernel.in_features) for kernel in kernels]
        if found != expected:
            raise ValueError(
                f"kernels must hold {self.groups} layers with (out_features, in_features) = "
                f"{expected[0]}, got {found}."
            )

    @classmethod
    def from_products(
        cls, conv: Convolution, products: Sequence[FactorProduct], *, copy: bool = True
    ) -> FactorizedConv:
        """Replace the kernels of `conv` by products, one per group; values are copied or shared."""
        weight = conv.weight
        layer = FactorizedConv(conv, [FactorizedLinear(p, copy=copy) for p in products])
        return layer.to(device=None if weight.is_meta else weight.device, dtype=weight.dtype)

    @classmethod
    def from_scratch(
        cls, conv: Convolution, layer: type[FactorizedLinear], **structure: Any
    ) -> FactorizedConv:
        """Return a convolution with the geometry of `conv` and random kernels of class `layer`.

        Parameters
        ----------
        conv : torch.nn.Conv1d, torch.nn.Conv2d or torch.nn.Conv3d
            Provides the geometry and the bias.
        layer : type
            One of the layers to train from scratch, such as `LowRankLinear`.
        **structure
            Its parameters, such as ``rank=4``.
        """
        columns = conv.in_channels // conv.groups * math.prod(conv.kernel_size)
        make: Any = layer
        kernels = [
            make(columns, conv.out_channels // conv.groups, bias=False, **structure)
            for _ in range(conv.groups)
        ]
        return cls(conv, kernels).to(device=conv.weight.device, dtype=conv.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense kernel, computed on each access."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return torch.cat([kernel.weight for kernel in self._groups()]).reshape(shape)

    def _groups(self) -> list[FactorizedLinear]:
        return cast(list[FactorizedLinear], list(self.kernels))

    def keeps_product(self) -> bool:
        """Whether eval mode uses the dense kernel instead of the factors."""
        if self.inference != "auto":
            return self.inference == "dense"
        return self._prefers_product()

    def _prefers_product(self, n_positions: int | None = None) -> bool:
        """Whether the dense kernel takes less work per position than the factors.

        With `n_positions`, include the work of computing the kernel for that many positions.
        """
        kernel, *_ = self._groups()  # all have the same structure
        work = sum(factor.work for factor in kernel.chain)
        dense: float = kernel.in_features * kernel.out_features
        if n_positions is not None:
            building = work - kernel.chain[-1].work
            dense += kernel.in_features * building / max(1, n_positions)
        if not isinstance(kernel.chain[-1], _FILTERS):  # patches are unfolded and transposed
            passes = 4 * kernel.in_features
            if n_positions is not None:
                passes = 2 * kernel.in_features + sum(factor.columns for factor in kernel.chain)
            work += _PASS * passes
        return dense <= work

    def forward(self, input: Tensor) -> Tensor:  # torch's name, for keyword calls
        """Convolve `input`, of shape (batch, channels, *size) or without the batch."""
        x = input
        check_tensor(x)
        batched = x if x.ndim == len(self.kernel_size) + 2 else x[None]
        out = self._convolve(pad(batched, self))
        return out if batched is x else out[0]

    def _convolve(self, x: Tensor) -> Tensor:
        """Return the output for padded, batched inputs."""
        if not self.training and self.keeps_product():
            kernel = self._kept_kernel()
            if kernel is not None:
                return self._conv(x, kernel, self.bias, self.groups)
        elif self._computes_product(x):
            return self._conv(x, self.weight, self.bias, self.groups)
        channels = self.in_channels // self.groups
        outputs = [
            self._convolve_group(x[:, i * channels : (i + 1) * channels], kernel)
            for i, kernel in enumerate(self._groups())
        ]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self.bias is None:
            return out
        return out + self.bias.to(out.dtype).reshape(-1, *[1] * (x.ndim - 2))

    def _kept_kernel(self) -> Tensor | None:
        """Return the cached dense kernel for inference, or None if it cannot be used."""
        if torch.compiler.is_compiling():
            return None
        values, fixed = [], []
        for group in self._groups():
            values += group.values()
            fixed += group.fixed()
        return self._kernel.get(values, lambda _: self.weight.detach(), fixed)

    def _computes_product(self, x: Tensor) -> bool:
        """Whether to compute the dense kernel for this call."""
        if torch.compiler.is_compiling() or not (self.training or self.inference == "auto"):
            return False
        size = _output_size(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        return self._prefers_product(x.shape[0] * math.prod(size))

    def _convolve_group(self, x: Tensor, kernel: FactorizedLinear) -> Tensor:
        *rest, last = kernel.chain
        if isinstance(last, _FILTERS):
            with fetched(last):
                filters = last.dense().reshape(last.rows, x.shape[1], *self.kernel_size)
            out = self._conv(x, filters, None, 1).movedim(1, -1)
            for factor in reversed(rest):
                out = factor(out)
            return out.movedim(-1, 1)
        size = _output_size(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        patches = unfold(x, self.kernel_size, self.stride, self.dilation)
        return kernel(patches).movedim(-1, 1).reshape(x.shape[0], -1, *size)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        convolve = _CONVOLVE[len(self.kernel_size)]
        return convolve(x, weight, bias, self.stride, 0, self.dilation, groups)

    def to_products(self) -> list[FactorProduct]:
        """Return the products of the groups, sharing memory with the values."""
        return [kernel.to_product() for kernel in self._groups()]

    def to_dense(self) -> Convolution:
        """Return the equivalent dense convolution."""
        make: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(self.kernel_size)]
        with fetched(self):
            value = self._groups()[0].chain[0].values
            dense = make(
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                self.dilation, self.groups, self.bias is not None, self.padding_mode,
                device=value.device, dtype=value.dtype,
            )  # fmt: skip
            return filled(dense, self)

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}"
        )


def pad(x: Tensor, conv: Any) -> Tensor:
    """Pad batched inputs like `conv`, dense or factorized."""
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        amounts = [(total // 2, total - total // 2) for total in reach]
    elif conv.padding == "valid":
        return x
    else:
        amounts = [(int(n), int(n)) for n in conv.padding]
    widths = [n for pair in reversed(amounts) for n in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return functional.pad(x, widths, mode=mode) if any(widths) else x


def unfold(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the patches of padded, batched inputs, of shape (batch, positions, patch)."""
    if len(kernel_size) == 3:
        return _unfold_volume(x, kernel_size, stride, dilation)
    if len(kernel_size) == 1:  # torch can only unfold images
        x, kernel_size = x[:, :, None], (1, *kernel_size)
        stride, dilation = (1, *stride), (1, *dilation)
    patches = functional.unfold(x, tuple(kernel_size), tuple(dilation), 0, tuple(stride))
    return patches.transpose(1, 2)


def _unfold_volume(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the patches of volumes."""
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    # (batch, channels, *positions, *kernel)
    return x.movedim(1, 4).flatten(4).flatten(1, 3)


def _output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
