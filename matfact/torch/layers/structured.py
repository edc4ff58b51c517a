"""Structured linear layers to train from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from matfact import metrics
from matfact.factorizers._chain import Layout
from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    Factor,
    FactorProduct,
    KroneckerSparseFactor,
    SelectionFactor,
    SparseFactor,
)
from matfact.solvers.chains import Chain, Pattern, dyadic_chain, square_root_chain, two_factor_chain
from matfact.torch.layers.init import random_support, reset_parameters
from matfact.torch.layers.linear import FactorizedLinear


class _StructuredLinear(FactorizedLinear):
    """Base class of layers with random initial values."""

    def __init__(
        self,
        factors: Sequence[Factor],
        bias: bool,
        random_state: Any,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        product = FactorProduct(factors)
        super().__init__(product, torch.zeros(product.shape[0]) if bias else None)
        self.to(device=device, dtype=dtype or torch.get_default_dtype())
        reset_parameters(self, random_state=random_state)


class SparseProductLinear(_StructuredLinear):
    """Linear layer with a product of sparse matrices on fixed random supports.

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs.
    bias : bool, default=True
        Whether to add a bias.
    density : float, default=0.25
        Stored values ÷ entries of the dense weight.
    n_factors : int, default=2
        Number of factors, all of the same density. Inner widths are the smaller of `in_features`
        and `out_features`.
    random_state : int, RandomState or None, default=None
        Seed of supports and values.
    device, dtype
        As in `torch.nn.Linear`.

    Examples
    --------
    >>> from matfact.torch import SparseProductLinear
    >>> layer = SparseProductLinear(64, 32, density=0.25, random_state=0)
    >>> layer.to_product().nnz
    512
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float = 0.25,
        n_factors: int = 2,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n_factors < 1:
            raise ValueError(f"n_factors must be at least 1, got {n_factors}.")
        rng = check_random_state(random_state)
        side = min(in_features, out_features)
        widths = [out_features, *[side] * (n_factors - 1), in_features]
        shapes = list(pairwise(widths))
        entries = sum(rows * columns for rows, columns in shapes)
        shape = (out_features, in_features)
        budget = metrics.stored_value_budget(density, shape, minimum=n_factors)
        factors: list[Factor] = []
        for rows, columns in shapes:
            nnz = min(rows * columns, max(1, round(budget * rows * columns / entries)))
            budget, entries = budget - nnz, entries - rows * columns
            mask = random_support((rows, columns), nnz, rng)
            factors.append(SparseFactor.from_dense(mask.astype(np.float32)))
        super().__init__(factors, bias, rng, device, dtype)


class ButterflyLinear(_StructuredLinear):
    """Linear layer with a chain of Kronecker-sparse factors.

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs.
    bias : bool, default=True
        Whether to add a bias.
    patterns : list of (a, b, c, d), optional
        Supports ``I_a ⊗ 1_{b×c} ⊗ I_d`` of the factors, which must chain. By default the maximum
        number of factors for the widths, with 2×2 blocks if these are powers of two.
    rank : int, default=1
        Rank of the blocks of the product, for the default chain.
    random_state : int, RandomState or None, default=None
        Seed of the values.
    device, dtype
        As in `torch.nn.Linear`.

    Examples
    --------
    >>> from matfact.torch import ButterflyLinear
    >>> ButterflyLinear(64, 64).to_product().nnz  # 2 · 64 · log2(64)
    768
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        patterns: Sequence[Pattern] | None = None,
        rank: int = 1,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_features, in_features)
        chain = (
            dyadic_chain(shape).with_rank(rank)
            if patterns is None
            else Chain.from_patterns(list(patterns))
        )
        super().__init__(_chain_factors(chain, shape), bias, random_state, device, dtype)


class KaleidoscopeLinear(_StructuredLinear):
    """Linear layer with a kaleidoscope matrix: butterflies times reversed butterflies.

    Source: Dao et al. (2020).

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs.
    bias : bool, default=True
        Whether to add a bias.
    width : int, default=1
        Number of pairs of a butterfly and a reversed butterfly.
    expansion : int, default=1
        Size of the butterflies ÷ size of the layer.
    random_state : int, RandomState or None, default=None
        Seed of the values.
    device, dtype
        As in `torch.nn.Linear`.

    References
    ----------
    - T. Dao, N. Sohoni, A. Gu, M. Eichhorn, A. Blonder, M. Leszczynski, A. Rudra, C. Ré,
      "Kaleidoscope: an efficient, learnable representation for all structured linear maps",
      ICLR 2020.

    Examples
    --------
    >>> from matfact.torch import KaleidoscopeLinear
    >>> KaleidoscopeLinear(64, 64).to_product().nnz  # 2 · 64 · (2 log2(64) - 1)
    1408
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        width: int = 1,
        expansion: int = 1,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("width", width), ("expansion", expansion)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        side = expansion * max(in_features, out_features)
        down = dyadic_chain((side, side)).patterns
        up = [(a, c, b, d) for a, b, c, d in reversed(down)]
        # Neighbours with equal supports are merged.
        patterns = [*down, *(up[1:] + down[1:]) * (width - 1), *up[1:]]
        factors: list[Factor] = [
            KroneckerSparseFactor(np.zeros((a, d, b, c), dtype=np.float32))
            for a, b, c, d in patterns
        ]
        like = factors[0].values
        n = factors[0].shape[0]
        if out_features < n:
            factors.insert(0, SelectionFactor.from_index(np.arange(out_features), n, like=like))
        if in_features < n:
            factors.append(SelectionFactor.from_index(np.arange(in_features), n, like=like).T)
        super().__init__(factors, bias, random_state, device, dtype)


class MonarchLinear(_StructuredLinear):
    """Linear layer with a Monarch matrix: two block-diagonal factors and a permutation.

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs.
    bias : bool, default=True
        Whether to add a bias.
    n_blocks : int or tuple of two int, optional
        Blocks of the left and right factor; by default the square roots of the widths.
    rank : int, default=1
        Rank of the blocks of the product.
    random_state : int, RandomState or None, default=None
        Seed of the values.
    device, dtype
        As in `torch.nn.Linear`.

    Examples
    --------
    >>> from matfact.torch import MonarchLinear
    >>> MonarchLinear(64, 64, n_blocks=8).to_product().nnz
    1024
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        n_blocks: int | tuple[int, int] | None = None,
        rank: int = 1,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_features, in_features)
        if n_blocks is None:
            chain = square_root_chain(shape)
        else:
            pair = n_blocks if isinstance(n_blocks, tuple) else (n_blocks, n_blocks)
            chain = two_factor_chain(shape, pair)
        factors = _chain_factors(chain.with_rank(rank), shape)
        super().__init__(factors, bias, random_state, device, dtype)


class BlockLowRankLinear(_StructuredLinear):
    """Linear layer with a grid of low-rank blocks.

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs, at least as large as the grid.
    bias : bool, default=True
        Whether to add a bias.
    grid : tuple of two int, default=(2, 2)
        Row strips and column strips.
    rank : int, default=1
        Rank of each block.
    random_state : int, RandomState or None, default=None
        Seed of the values.
    device, dtype
        As in `torch.nn.Linear`.

    Examples
    --------
    >>> from matfact.torch import BlockLowRankLinear
    >>> BlockLowRankLinear(64, 64, grid=(2, 2), rank=4).to_product().nnz
    1024
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: tuple[int, int] = (2, 2),
        rank: int = 1,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        limits = (out_features, in_features)
        if any(not 1 <= parts <= n for parts, n in zip(grid, limits, strict=True)):
            raise ValueError(f"grid must lie between (1, 1) and {limits}, got {grid}.")
        inner = rank * grid[0] * grid[1]
        rows, columns = (
            np.linspace(0, n, parts + 1).astype(int) for n, parts in zip(limits, grid, strict=True)
        )
        left, right, left_corners, right_corners = [], [], [], []
        for k, (i, j) in enumerate(np.ndindex(*grid)):
            left.append(np.zeros((rows[i + 1] - rows[i], rank), dtype=np.float32))
            right.append(np.zeros((rank, columns[j + 1] - columns[j]), dtype=np.float32))
            left_corners.append((int(rows[i]), k * rank))
            right_corners.append((k * rank, int(columns[j])))
        place = BlockSparseFactor.from_blocks
        factors = [
            place(left, left_corners, (out_features, inner), like=left[0]),
            place(right, right_corners, (inner, in_features), like=right[0]),
        ]
        super().__init__(factors, bias, random_state, device, dtype)


class LowRankLinear(_StructuredLinear):
    """Linear layer with two dense factors.

    Parameters
    ----------
    in_features, out_features : int
        Number of inputs and outputs.
    bias : bool, default=True
        Whether to add a bias.
    rank : int
        Inner width.
    random_state : int, RandomState or None, default=None
        Seed of the values.
    device, dtype
        As in `torch.nn.Linear`.

    Examples
    --------
    >>> from matfact.torch import LowRankLinear
    >>> LowRankLinear(64, 32, rank=4).to_product().nnz
    384
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        random_state: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shapes = (out_features, rank), (rank, in_features)
        factors = [DenseFactor(np.zeros(shape, dtype=np.float32)) for shape in shapes]
        super().__init__(factors, bias, random_state, device, dtype)


def _chain_factors(chain: Chain, shape: tuple[int, int]) -> list[Factor]:
    """Return factors of `chain` with zero values, cropped to `shape`."""
    if any(padded < n for padded, n in zip(chain.shape, shape, strict=True)):
        raise ValueError(
            f"patterns must give a product of at least {shape[0]}×{shape[1]}, got "
            f"{chain.shape[0]}×{chain.shape[1]}."
        )
    values = [np.zeros((a, d, b, c), dtype=np.float32) for a, b, c, d in chain.patterns]
    return Layout.of(np.zeros(shape, dtype=np.float32), chain).factors(values)
