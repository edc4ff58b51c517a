"""Chains of factor modules: which module a factor gets, and products of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    Factor,
    KroneckerSparseFactor,
    QuantizedFactor,
    SelectionFactor,
    SignFactor,
    SparseFactor,
)
from matfact.torch.layers._coded import (
    QuantizedBlockModule,
    QuantizedDenseModule,
    QuantizedKroneckerModule,
    QuantizedSparseModule,
    SignFactorModule,
)
from matfact.torch.layers._factors import (
    BlockFactorModule,
    DenseFactorModule,
    FactorModule,
    KroneckerFactorModule,
    SelectionFactorModule,
    SparseFactorModule,
    on_columns,
)
from matfact.torch.running._offloaded import fetched

_WIDTH = 32  #: maximum width of merged blocks; at most the number of samples

_MODULES: dict[type[Factor], Any] = {
    DenseFactor: DenseFactorModule,
    SparseFactor: SparseFactorModule,
    KroneckerSparseFactor: KroneckerFactorModule,
    BlockSparseFactor: BlockFactorModule,
    SelectionFactor: SelectionFactorModule,
    SignFactor: SignFactorModule,
}
#: Modules of quantized factors, by the storage of their positions.
_QUANTIZED: dict[type[Factor], Any] = {
    DenseFactor: QuantizedDenseModule,
    SparseFactor: QuantizedSparseModule,
    KroneckerSparseFactor: QuantizedKroneckerModule,
    BlockSparseFactor: QuantizedBlockModule,
}


def factor_module(factor: Factor, copy: bool = True) -> FactorModule:
    """Return the module that applies `factor`."""
    if isinstance(factor, QuantizedFactor):
        return _QUANTIZED[type(factor.pattern)](factor, copy)
    return _MODULES[type(factor)](factor, copy)


def apply_factors(chain: Sequence[FactorModule], x: Tensor) -> Tensor:
    """Apply a product of factors to the last axis of `x`.

    For Kronecker-sparse factors samples are columns, so that small blocks multiply long rows.
    """
    samples, are_columns = x.reshape(-1, x.shape[-1]), False
    # The number of samples may be symbolic in compiled graphs.
    width = _WIDTH if torch.compiler.is_compiling() else min(_WIDTH, samples.shape[0])
    factors = list(chain)
    while factors:
        factor = factors.pop()
        if _is_kronecker_on(factor, x):
            blocks: Tensor = factor.values
            while factors and _is_kronecker_on(factors[-1], x):
                wider = _joined(factors[-1].values, blocks, width)
                if wider is None:
                    break
                blocks = wider
                factors.pop()
            samples = on_columns(blocks, samples if are_columns else samples.T)
            are_columns = True
        else:
            samples = factor(samples.T if are_columns else samples)
            are_columns = False
    samples = samples.T if are_columns else samples
    return samples.reshape(*x.shape[:-1], samples.shape[1])


def _is_kronecker_on(factor: FactorModule, x: Tensor) -> TypeGuard[KroneckerFactorModule]:
    """Whether `factor` has Kronecker-sparse values on the device of `x`.

    Values elsewhere are offloaded, and only fetched by hooks when the factor is called.
    """
    return isinstance(factor, KroneckerFactorModule) and factor.values.device == x.device


def _joined(left: Tensor, right: Tensor, width: int) -> Tensor | None:
    """Return the values of the product of two Kronecker-sparse factors with small blocks.

    In a butterfly or a transposed one, the block size of the product of two neighbours is the
    product of their block sizes, and its entries involve no sums. Applying it is more work, but in
    fewer and larger operations.
    """
    if max(left.shape[2] * right.shape[2], left.shape[3] * right.shape[3]) > width:
        return None
    joined = _outer(left, right)
    if joined is None:
        transposed = _outer(right.mT, left.mT)
        return None if transposed is None else transposed.mT
    return joined


def _outer(left: Tensor, right: Tensor) -> Tensor | None:
    """Return the values of the product if each block of `left` spans whole blocks of `right`."""
    (a, d, b, c), (n_right, d_right, b_right, c_right) = left.shape, right.shape
    if n_right != a * c or d != b_right * d_right:
        return None
    left = left.reshape(a, b_right, d_right, b, c).permute(0, 2, 3, 1, 4)
    right = right.reshape(a, c, d_right, b_right, c_right).permute(0, 2, 3, 1, 4)
    joined = left[..., None] * right[:, :, None]
    return joined.reshape(a, d_right, b * b_right, c * c_right)


def dense_product(chain: Sequence[FactorModule]) -> Tensor:
    """Return the product of factors as a differentiable matrix."""
    with fetched(*chain):
        return _dense_product(chain)


def _dense_product(chain: Sequence[FactorModule]) -> Tensor:
    *left, last = chain
    if left and isinstance(last, SelectionFactorModule):
        return _dense_product(left) @ last.dense()
    if isinstance(last, KroneckerFactorModule):
        factor = KroneckerSparseFactor(last.values)
        # Much less work than applying the factors to unit vectors.
        while left and isinstance(left[-1], KroneckerFactorModule):
            merged = KroneckerSparseFactor(left[-1].values).merged(factor)
            if merged is None:
                break
            factor = merged
            left.pop()
        product = factor.toarray().to(last.values.dtype)  # merged in single precision
    else:
        product = last.dense()
    for module in reversed(left):
        product = module(product.T).T
    return product
