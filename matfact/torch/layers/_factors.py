"""Modules for factors: values are parameters, positions are buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    Factor,
    KroneckerSparseFactor,
    SelectionFactor,
    SparseFactor,
)
from matfact.torch.kernels import operators, roads
from matfact.torch.kernels.roads import Road, Storage
from matfact.torch.layers._gpu import Target, available, road_for, takes_blocks
from matfact.torch.layers._semi_structured import SemiStructured

_BLOCK = 64  #: largest blocks, in entries, for which the kernel always beats batched products
_MANY = 64  #: samples from which batched products are faster for larger blocks


class FactorModule(nn.Module):
    """Factor of a product, applied to the last axis of its input.

    Only the values have gradients, so optimizers cannot change the support.

    Parameters
    ----------
    factor : Factor
        NumPy or torch values and their positions.
    copy : bool, default=True
        Whether the values are copied.
    """

    #: Name of the parameter; "" if there is none.
    trained = "values"
    #: Name of what is `stored`.
    held = "values"
    #: Names of the buffers that the matrix depends on.
    fixed: tuple[str, ...] = ()

    def __init__(self, factor: Factor, copy: bool = True) -> None:
        super().__init__()
        self.rows, self.columns = factor.shape
        self._store(factor, copy)

    def _store(self, factor: Factor, copy: bool) -> None:
        """Store what the factor has for each of its positions."""
        self.values = nn.Parameter(tensor_of(factor.values, copy))

    @property
    def stored(self) -> Tensor:
        """What is stored for each position."""
        return self.values

    def _resize(self, shape: torch.Size) -> None:
        """Make room for values of another shape, which a state dict holds."""
        if "values" in self._parameters:
            self.values = nn.Parameter(self.values.detach().new_empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        out = self._on_gpu(x) if x.is_cuda else None
        return self._by_torch(x) if out is None else out

    def _by_torch(self, x: Tensor) -> Tensor:
        """Apply the factor with operations of torch."""
        raise NotImplementedError

    def _on_gpu(self, x: Tensor) -> Tensor | None:
        """Apply the factor on a road that is faster than torch on a GPU; None if there is none."""
        return None

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        """Return the predicted time of each road to apply the factor on a GPU."""
        return {"torch": roads.dense(self.rows, self.columns, samples, target.dtype.itemsize)}

    def dense(self) -> Tensor:
        """Return the matrix as a differentiable function of the values."""
        return self(torch.eye(self.columns, dtype=self.values.dtype, device=self.values.device)).T

    def to_factor(self) -> Factor:
        """Return the factor, sharing memory with the values but not with the positions."""
        raise NotImplementedError

    def on_host(self, numbers: np.ndarray | None) -> Factor:
        """Return the factor with NumPy arrays, `numbers` in place of the parameter."""
        factor = self.to_factor()
        return factor.with_values(factor.values.numpy() if numbers is None else numbers)

    def assign(self, factor: Factor) -> None:
        """Take over the values of `factor`, which has the same positions."""
        self.values.copy_(factor.values)

    @property
    def n_values(self) -> int:
        """Number of entries stored."""
        return self.stored.numel()

    @property
    def work(self) -> int:
        """Multiplications per sample in `forward`."""
        return self.n_values

    def has_gradient_kernel(self, x: Tensor) -> bool:
        """Whether the kernels support gradients of this factor, for samples like `x`."""
        return False

    def _holds(self, x: Tensor) -> bool:
        """Whether the values are a parameter like `x` and have not been replaced."""
        values = self._parameters.get("values")
        return (
            type(values) is nn.Parameter
            and (values.dtype, values.device) == (x.dtype, x.device)
            and values.is_contiguous()
        )

    def extra_repr(self) -> str:
        return f"{self.rows}×{self.columns}, {self.n_values} values"


class DenseFactorModule(FactorModule):
    """Dense factor."""

    def _by_torch(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.values)

    def dense(self) -> Tensor:
        return self.values

    def to_factor(self) -> DenseFactor:
        return DenseFactor(self.stored.detach())


class SparseFactorModule(FactorModule):
    """Sparse factor, with positions stored as a mask of one bit per entry.

    The mask is saved in state dicts; the indices derived from it are not. Column numbers that fit
    into 16 bits are stored as two bytes in little-endian order, since torch cannot send 16-bit
    integers between processes. Loading a state dict with another support, of any size, replaces the
    support.
    """

    fixed: tuple[str, ...] = ("mask",)
    mask: Tensor
    indices: Tensor
    indptr: Tensor

    def __init__(self, factor: SparseFactor, copy: bool = True) -> None:
        if not factor.is_ordered:
            order = np.argsort(factor.locations)
            values = tensor_of(factor.values, copy=False)[torch.from_numpy(order)]
            factor = SparseFactor.from_locations(values, factor.locations[order], factor.shape)
        super().__init__(factor, copy)
        self.semi_structured = SemiStructured()
        self.register_buffer("mask", tensor_of(factor.bits, copy).to(self.stored.device))
        self._keep(factor)

    def _locate(self) -> None:
        """Expand the mask to the positions of the values."""
        if self.mask.is_meta:  # nothing to expand until a state dict is loaded
            return
        shape = (self.rows, self.columns)
        self._keep(SparseFactor.from_bits(self.stored.detach(), self.mask.cpu().numpy(), shape))

    def _keep(self, factor: SparseFactor) -> None:
        """Store the positions of the values of `factor`."""
        if self.columns <= 1 << 16:
            indices = factor.indices.astype("<u2", copy=False).view(np.uint8).reshape(-1, 2)
        else:
            indices = factor.indices.astype(np.int32, copy=False)
        for name, positions in (("indices", indices), ("indptr", factor.indptr)):
            tensor = torch.from_numpy(positions).to(self.mask.device)
            self.register_buffer(name, tensor, persistent=False)
        self.semi_structured.relocate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("semi_structured", SemiStructured())
        if self.indices.dtype == torch.int16:  # written by an earlier version
            self._buffers["indices"] = self.indices[:, None].view(torch.uint8)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}{self.held}")
        if loaded is not None and loaded.shape != self.stored.shape and loaded.ndim == 1:
            self._resize(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}mask" in state_dict:
            self._locate()

    def dense(self) -> Tensor:
        return operators.scattered(self.values, self.indices, self.indptr, self.columns)

    def _by_torch(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense())

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        itemsize = target.dtype.itemsize
        storage = Storage("sparse", self.rows, self.columns, self.n_values, itemsize)
        times = available(roads.times(storage, samples, itemsize), target)
        if self.semi_structured.suits(self, target):
            times["semi-structured"] = roads.semi_structured(storage, samples, itemsize)
        return times

    def _on_gpu(self, x: Tensor) -> Tensor | None:
        values = self.values
        road = road_for(self, x, values)
        if road == "semi-structured":
            return self.semi_structured.apply(self, x)
        if road == "torch":
            return None
        out = operators.sparse_linear(
            x.reshape(-1, self.columns), values, self.mask, self.indices, self.indptr
        )
        return out.reshape(*x.shape[:-1], self.rows)

    @property
    def work(self) -> int:
        return self.rows * self.columns

    def has_gradient_kernel(self, x: Tensor) -> bool:
        indices = self._buffers["indices"]
        return indices is not None and indices.dtype == torch.uint8 and self._holds(x)

    def to_factor(self) -> SparseFactor:
        indices, indptr = own(self.indices), own(self.indptr)
        if indices.dtype == np.uint8:
            indices = indices.view("<u2")[:, 0]
        return SparseFactor(self.stored.detach(), indices, indptr, self.columns)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.semi_structured.remark


class KroneckerFactorModule(FactorModule):
    """Butterfly, Monarch or block-diagonal factor."""

    def _by_torch(self, x: Tensor) -> Tensor:
        samples = x.reshape(-1, self.columns)
        return on_columns(self.values, samples.T).T.reshape(*x.shape[:-1], self.rows)

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        a, d, b, c = self.stored.shape
        return available(roads.blocks((a, d, b, c), samples, target.dtype.itemsize), target)

    def has_gradient_kernel(self, x: Tensor) -> bool:
        samples = x.numel() // self.columns
        small = self.values.shape[2] * self.values.shape[3] <= _BLOCK
        return self._holds(x) and (small or samples < _MANY)

    def to_factor(self) -> KroneckerSparseFactor:
        return KroneckerSparseFactor(self.stored.detach())


def on_columns(values: Tensor, X: Tensor) -> Tensor:
    """Apply the Kronecker-sparse factor with the given values to the columns of `X`."""
    a, d, b, c = values.shape
    if takes_blocks(values, X):
        return operators.kronecker_linear(X.T, values).T
    blocks = X.reshape(a, c, d, X.shape[1]).transpose(1, 2)
    product = torch.matmul(values, blocks).transpose(1, 2)
    return product.reshape(a * b * d, X.shape[1])


class BlockFactorModule(FactorModule):
    """Factor with dense blocks at any position."""

    fixed: tuple[str, ...] = ("spans",)
    spans: Tensor

    def __init__(self, factor: BlockSparseFactor, copy: bool = True) -> None:
        super().__init__(factor, copy)
        self.register_buffer("spans", torch.from_numpy(np.array(factor.blocks, dtype=np.int64)))
        self._read_spans()

    def _read_spans(self) -> None:
        """Also store the positions as Python numbers, which compiled graphs need."""
        self._blocks = [tuple(span) for span in self.spans.tolist()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        self._read_spans()

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        itemsize = target.dtype.itemsize
        sides = ((r1 - r0, c1 - c0) for r0, r1, c0, c1 in self._blocks)
        return {
            "torch": sum(roads.dense(*side, samples, itemsize) + roads.LAUNCH for side in sides)
        }

    def _by_torch(self, x: Tensor) -> Tensor:
        out, start, values = None, 0, self.values
        for r0, r1, c0, c1 in self._blocks:
            stop = start + (r1 - r0) * (c1 - c0)
            block = values[start:stop].reshape(r1 - r0, c1 - c0)
            part = functional.linear(x[..., c0:c1], block)
            if out is None:  # with the dtype of autocast, and batched like the values under vmap
                out = part.new_zeros(*x.shape[:-1], self.rows)
            out[..., r0:r1] += part
            start = stop
        return x.new_zeros(*x.shape[:-1], self.rows) if out is None else out

    def to_factor(self) -> BlockSparseFactor:
        dimensions = np.asarray([self.rows, self.columns], dtype=np.int64)
        return BlockSparseFactor(self.stored.detach(), own(self.spans), dimensions)


class SelectionFactorModule(FactorModule):
    """Permutation, padding or cropping, without trainable values."""

    trained, fixed = "", ("index",)
    index: Tensor

    def _store(self, factor: Factor, copy: bool) -> None:
        assert isinstance(factor, SelectionFactor)
        self.register_buffer("values", tensor_of(factor.values, copy=True), persistent=False)
        self.register_buffer("index", torch.from_numpy(np.array(factor.index, dtype=np.int64)))

    def gpu_times(self, samples: int, target: Target) -> dict[Road, float]:
        n_bytes = 2 * samples * (self.rows + self.columns) * target.dtype.itemsize
        return {"torch": roads.seconds("dense", n_bytes, 0, 1, launches=3)}

    def _by_torch(self, x: Tensor) -> Tensor:
        # Entries without a source read the zero appended after the last column.
        source = torch.where(self.index < 0, self.columns, self.index)
        return functional.pad(x, (0, 1)).index_select(-1, source)

    def has_gradient_kernel(self, x: Tensor) -> bool:
        return True

    def to_factor(self) -> SelectionFactor:
        return SelectionFactor(self.values.detach(), own(self.index), self.columns)


def own(positions: Tensor) -> np.ndarray:
    """Copy positions, since torch may free memory shared with buffers."""
    return np.array(positions.numpy(force=True))


def tensor_of(values: Any, copy: bool) -> Tensor:
    """Return `values` as a contiguous tensor, copied if `copy` is true."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if not array.flags.writeable:  # torch would warn
            array, copy = array.copy(), False
        values = torch.from_numpy(array)
    tensor = values.detach()
    if copy:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()
