"""Modules for factors of few bits a value: codes are buffers, scales are parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact.operators import DenseFactor, Factor, QuantizedFactor, SignFactor, SparseFactor
from matfact.operators._quantized import BITS, first_groups, group_bounds
from matfact.torch.kernels import operators, roads
from matfact.torch.kernels.roads import Road, Storage
from matfact.torch.layers._factors import (
    BlockFactorModule,
    DenseFactorModule,
    FactorModule,
    KroneckerFactorModule,
    SparseFactorModule,
    own,
    tensor_of,
)
from matfact.torch.layers._gpu import Target, available, road_for

_SLAB = 1 << 20  #: numbers decoded at a time
#: Sides up to which places in a row times its groups fit 32 bits.
_NARROW = 46340


class _Quantized(FactorModule):
    """Mixin of quantized factors: values are levels times the scales of their groups.

    Scales are trained; levels, one byte each, are a buffer. The parameter holds scales times a
    power of two about as large as the largest level: it is of the size of values, and suits their
    learning rates. Bits, group size and that power are in state dicts, so that loading another
    number of groups replaces the groups.
    """

    trained, held = "scales", "codes"
    codes: Tensor
    coding: Tensor
    lengths: Tensor
    scales: nn.Parameter
    #: Length of all groups, None if they differ.
    _length: int | None = None

    def __init__(self, factor: QuantizedFactor, copy: bool = True) -> None:
        pattern = factor.pattern
        if isinstance(pattern, SparseFactor) and not pattern.is_ordered:
            raise ValueError(
                "a quantized factor must hold its values in the order of their positions, got "
                f"{factor!r} in another."
            )
        super().__init__(pattern.with_values(factor.values), copy)
        largest = int(self.codes.abs().max()) if self.codes.numel() else 1
        unit = 1 << max(0, largest.bit_length() - 1)
        self.scales = nn.Parameter(tensor_of(factor.scales, copy=False) * unit)
        coding = torch.tensor([factor.bits, factor.group_size or 0, unit])
        self.register_buffer("coding", coding.to(self.codes.device))
        self._group()

    def _store(self, factor: Factor, copy: bool) -> None:
        self.register_buffer("codes", tensor_of(factor.values, copy))

    @property
    def stored(self) -> Tensor:
        return self.codes

    def _resize(self, shape: torch.Size) -> None:
        self.codes = self.codes.new_empty(shape)

    def _group(self) -> None:
        """Store the coding as Python numbers, and the length of each group."""
        if self.coding.is_meta:  # nothing to group until a state dict is loaded
            return
        self.bits, size, self.unit = self.coding.tolist()
        self.group_size = size or None
        pattern = super().to_factor()
        lengths = np.diff(group_bounds(pattern, self.group_size))
        self._length = int(lengths[0]) if lengths.size and np.ptp(lengths) == 0 else None
        tensor = torch.from_numpy(lengths).to(self.codes.device)
        self.register_buffer("lengths", tensor, persistent=False)
        if isinstance(pattern, (DenseFactor, SparseFactor)):  # whose groups belong to rows
            groups = torch.from_numpy(first_groups(pattern, self.group_size))
            dtype = torch.int32 if max(pattern.shape) <= _NARROW else torch.int64
            groups = groups.to(self.codes.device, dtype)
            self.register_buffer("groups", groups, persistent=False)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values, as a differentiable function of the scales."""
        codes, scales = self.codes, self.scales
        if scales.dtype == torch.float16:  # which might not hold scales without the unit
            codes = codes.to(scales.dtype) / self.unit
        else:
            scales = scales / self.unit
        if self._length is not None:
            return (codes.reshape(-1, self._length) * scales[:, None]).reshape(codes.shape)
        return codes * _repeated(scales, self.lengths, codes.numel()).reshape(codes.shape)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        coding = state_dict.get(f"{prefix}coding")
        if coding is not None and not coding.is_meta and not _is_coding(coding):
            args[-1].append(
                f"{prefix}coding must hold bits from 2 to 8, a group size of at least 0 and a unit "
                f"of at least 1, got {coding.tolist()}."
            )
            return
        loaded = state_dict.get(f"{prefix}scales")
        if loaded is not None and loaded.ndim == 1 and loaded.shape != self.scales.shape:
            self.scales = nn.Parameter(self.scales.detach().new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._group()
        if len(self.lengths) != len(self.scales):
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}scales must hold one number for each of {len(self.lengths)} groups, got "
                f"{len(self.scales)}."
            )

    def to_factor(self) -> Any:  # QuantizedFactor, which no base class returns
        pattern = super().to_factor()
        scales = self.scales.detach()
        if scales.dtype == torch.float16:  # which might not hold them without the unit
            scales = scales.float()
        scales = scales / self.unit
        return QuantizedFactor(pattern.values, scales, self.bits, self.group_size, pattern)

    def on_host(self, numbers: np.ndarray | None) -> QuantizedFactor:
        factor, codes = self.to_factor(), own(self.codes)
        pattern = factor.pattern.with_values(codes)
        scales = None if numbers is None else numbers / numbers.dtype.type(self.unit)
        return dataclasses.replace(factor, values=codes, scales=scales, pattern=pattern)

    def assign(self, factor: Factor) -> None:
        assert isinstance(factor, QuantizedFactor)
        self.scales.copy_(factor.scales * self.unit)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()} of {self.bits} bits"

    def _coded_times(self, kind: roads.Kind, samples: int, target: Target) -> dict[Road, float]:
        storage = Storage(
            kind, self.rows, self.columns, self.codes.numel(), 1, self.group_size is not None
        )
        return available(roads.times(storage, samples, target.dtype.itemsize), target)

    def _on_gpu(self, x: Tensor) -> Tensor | None:
        groups = self._buffers.get("groups")
        if groups is None or road_for(self, x, self.scales) == "torch":
            return None
        mask, indices, indptr = map(self._buffers.get, ("mask", "indices", "indptr"))
        out = operators.coded_linear(
            x.reshape(-1, self.columns), self.codes, self.scales, groups, self.unit,
            self.group_size is not None, mask, indices, indptr,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], self.rows)


def _is_coding(coding: Tensor) -> bool:
    """Whether a tensor holds bits, the size of groups and the unit of scales."""
    if coding.shape != (3,):
        return False
    bits, size, unit = coding.tolist()
    return bits in BITS and size >= 0 and unit >= 1


def _repeated(scales: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Return each scale as often as its group is long, `size` numbers in all."""
    if not torch.compiler.is_compiling():
        return scales.repeat_interleave(lengths, output_size=size)
    # Slower outside of compiled graphs, but ONNX has no such operation.
    ends = lengths.cumsum(0)[:-1]
    steps = lengths.new_zeros(size + 1).scatter_add(0, ends, torch.ones_like(ends))
    return scales[steps[:size].cumsum(0)]


class QuantizedDenseModule(_Quantized, DenseFactorModule):
    """Dense factor of quantized values."""

    fixed = ("codes", "coding")

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        return self._coded_times("codes", samples, target)

    @property
    def decodes_rows(self) -> bool:
        """Whether `decoded_linear` applies: to groups of one length, not with scales of halves."""
        return self._length is not None and self.scales.dtype != torch.float16

    def decoded_linear(self, x: Tensor) -> Tensor:
        """Apply the factor some rows at a time, so that few decoded numbers take memory."""
        # The view is made outside, so that it can be changed where gradients are recorded.
        return self._decoded_linear(x.reshape(-1, self.columns)).reshape(*x.shape[:-1], self.rows)

    @torch.no_grad()
    def _decoded_linear(self, samples: Tensor) -> Tensor:
        out = samples.new_empty((len(samples), self.rows))
        scales = (self.scales / self.unit).reshape(self.rows, -1, 1)
        codes = self.codes.reshape(self.rows, scales.shape[1], -1)
        height = min(self.rows, max(1, _SLAB // self.columns))
        memory = samples.new_empty((height, *codes.shape[1:]))
        for first in range(0, self.rows, height):
            part = slice(first, min(first + height, self.rows))
            weight = memory[: part.stop - first]
            torch.mul(codes[part], scales[part], out=weight)
            torch.mm(samples, weight.flatten(1).T, out=out[:, part])
        return out


class QuantizedSparseModule(_Quantized, SparseFactorModule):
    """Sparse factor of quantized values."""

    fixed = ("codes", "coding", "mask")

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        return self._coded_times("sparse", samples, target)


class QuantizedKroneckerModule(_Quantized, KroneckerFactorModule):
    """Kronecker-sparse factor of quantized values, such as a diagonal."""

    fixed = ("codes", "coding")


class QuantizedBlockModule(_Quantized, BlockFactorModule):
    """Factor with dense blocks of quantized values."""

    fixed = ("codes", "coding", "spans")


class SignFactorModule(FactorModule):
    """Dense matrix of signs, one bit each, without trainable values."""

    trained, fixed = "", ("signs",)
    signs: Tensor

    def _store(self, factor: Factor, copy: bool) -> None:
        assert isinstance(factor, SignFactor)
        empty = tensor_of(factor.values, copy=True)
        self.register_buffer("values", empty, persistent=False)
        self.register_buffer("signs", tensor_of(factor.bits, copy).to(empty.device))

    @property
    def n_values(self) -> int:
        return self.rows * self.columns

    def dense(self) -> Tensor:
        return operators.signs_of(self.signs, self.rows, self.columns, self.values.dtype)

    def _by_torch(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense())

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        storage = Storage("signs", self.rows, self.columns, self.n_values, 0)
        return available(roads.times(storage, samples, target.dtype.itemsize), target)

    def _on_gpu(self, x: Tensor) -> Tensor | None:
        if road_for(self, x, self.values) == "torch":
            return None
        out = operators.sign_linear(x.reshape(-1, self.columns), self.signs, self.rows)
        return out.reshape(*x.shape[:-1], self.rows)

    def to_factor(self) -> SignFactor:
        return SignFactor(self.values.detach(), own(self.signs), (self.rows, self.columns))


def is_coded(module: nn.Module) -> bool:
    """Whether a module stores codes of few bits instead of values."""
    return isinstance(module, (_Quantized, SignFactorModule))


def refuse_codes(model: nn.Module, purpose: str) -> None:
    """Raise ``ValueError`` if a factor in `model` stores codes, which `purpose` would change."""
    for name, module in model.named_modules():
        if is_coded(module):
            raise ValueError(
                f"model must store floating-point values {purpose}, but {name!r} stores codes of "
                "few bits, of which only the scales can change."
            )
