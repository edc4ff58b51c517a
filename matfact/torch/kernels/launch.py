"""Launches of the Triton kernels: sizes of tiles, strides and outputs.

The sizes are first guesses, which no GPU has timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from matfact.torch.kernels import _decoded, _kronecker

_DOT = 16  #: smallest side of a tile for tensor cores
_TILE = 2048  #: entries of a tile that is summed without them
_PROGRAMS, _SPAN = 512, 128  #: programs wanted for a gradient, and least samples of one
_FEW = 8  #: samples up to which sums of products are used


#: How levels are decoded, as in ``operators.coded_linear``: scales, groups, unit, is_grouped.
Codes = tuple[Tensor, Tensor, int, bool]


def tiles(
    x: Tensor, rows: int, values: Tensor, *, bits: Tensor, indptr: Tensor | None = None,
    codes: Codes | None = None, is_signs: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``x @ A.T`` for a matrix of signs, of scattered values, or dense codes."""
    n, columns = x.shape
    out = x.new_empty(n, rows)
    if out.numel() == 0:
        return out
    uses_dot = n > _FEW
    N = min(64, max(_DOT, next_power_of_2(n))) if uses_dot else next_power_of_2(n)
    R, C = (64, 128 // x.itemsize) if uses_dot else (4, max(32, 512 // N))
    scales, groups, unit, is_grouped = codes or (values, values, 1, False)
    _decoded.by_tiles[(cdiv(rows, R) * cdiv(n, N),)](
        x, values, bits, values if indptr is None else indptr, scales, groups, out,
        n, rows, columns, *x.stride(), unit,
        IS_SIGNS=is_signs, IS_MASKED=indptr is not None,
        IS_CODED=codes is not None, IS_GROUPED=is_grouped,
        IS_ALIGNED=columns % 8 == 0, USES_DOT=uses_dot, PRECISION=_precision(), R=R, C=C, N=N,
    )  # fmt: skip
    return out


def rows(
    x: Tensor, rows: int, values: Tensor, *, indices: Tensor, indptr: Tensor,
    codes: Codes | None = None,
) -> Tensor:  # fmt: skip
    """Return ``x @ A.T`` for compressed sparse rows."""
    n = len(x)
    out = x.new_empty(n, rows)
    if out.numel() == 0:
        return out
    is_narrow = indices.dtype == torch.uint8  # two bytes for each
    N = min(_DOT, next_power_of_2(n))
    R, K = 4, max(16, 256 // N)
    samples = x if n == 1 else x.T.contiguous().T  # what is gathered for an index is adjacent
    scales, groups, unit, is_grouped = codes or (values, values, 1, False)
    _decoded.by_rows[(cdiv(rows, R) * cdiv(n, N),)](
        samples, values, indices.view(torch.int16) if is_narrow else indices, indptr,
        scales, groups, out, n, rows, *samples.stride(), unit,
        IS_NARROW=is_narrow, IS_CODED=codes is not None, IS_GROUPED=is_grouped, R=R, K=K, N=N,
    )  # fmt: skip
    return out


def kronecker(x: Tensor, values: Tensor) -> Tensor:
    """Return the product with a Kronecker-sparse factor; neighbours in memory are samples."""
    a, d, b, c = values.shape
    n = len(x)
    out = x.new_empty(a * b * d, n).T
    if out.numel() == 0:
        return out
    arguments = (x, values, out, n, a, d, b, c, *x.stride(), *values.stride(), *out.stride())
    if n > 1 and _are_large(b, c):
        B, C, N = _side(b), _side(c, 32), _side(n)
        _kronecker.dots[(a * d * cdiv(b, B) * cdiv(n, N),)](
            *arguments, PRECISION=_precision(), B=B, C=C, N=N
        )
        return out
    N = min(32, next_power_of_2(n))
    C = 1 if N > _FEW else min(64, next_power_of_2(c))
    B = min(16, next_power_of_2(b))
    D = max(1, min(next_power_of_2(d), _TILE // (B * C * N)))
    grid = (a * cdiv(d, D) * cdiv(b, B) * cdiv(n, N),)
    _kronecker.sums[grid](*arguments, D=D, B=B, C=C, N=N)
    return out


def kronecker_gradient(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """Return the gradient of the values of a Kronecker-sparse factor."""
    a, d, b, c = shape
    n = len(x)
    large = _are_large(b, c)
    limit = 64 if large else 16
    B, C, N = min(limit, _power(b)), min(limit, _power(c)), min(32, _power(n))
    D = 1
    if large:
        B, C, N = max(_DOT, B), max(_DOT, C), max(_DOT, N)
    else:
        D = max(1, min(_power(d), _TILE // (B * C * N)))
    tiles = a * cdiv(d, D) * cdiv(b, B) * cdiv(c, C)
    if min(tiles, n) == 0:
        return x.new_zeros(shape)
    parts = max(1, min(_PROGRAMS // tiles, n // _SPAN))
    span = cdiv(cdiv(n, parts), N) * N
    parts = cdiv(n, span)
    out = x.new_empty((parts, *shape), dtype=torch.float32 if parts > 1 else x.dtype)
    arguments = (x, grad, out, n, span, a, d, b, c, *x.stride(), *grad.stride())
    if large:
        _kronecker.gradient_dots[(tiles * parts,)](
            *arguments, PRECISION=_precision(), B=B, C=C, N=N
        )
    else:
        _kronecker.gradient_sums[(tiles * parts,)](*arguments, D=D, B=B, C=C, N=N)
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


def _are_large(b: int, c: int) -> bool:
    return min(b, c) >= _DOT


def _side(size: int, limit: int = 64) -> int:
    """Return the side of a tile for tensor cores."""
    return min(limit, max(_DOT, _power(size)))


def _power(size: int) -> int:
    power: int = next_power_of_2(max(1, size))
    return power


def _precision() -> Any:
    """Return how products of float32 are computed: as torch is set to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
