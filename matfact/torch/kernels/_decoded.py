"""Triton kernels that multiply samples by matrices stored as bits, codes or scattered values.

Matrices are decoded where they are multiplied: only what is stored is read from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decode(stored, scales, groups, row, before, length, unit, inside):
    """Return the values of codes: level times the scale of its group.

    The groups of a row of `length` values are as even as possible, so that the number of a group
    follows from the number of values `before`; see ``matfact.operators._quantized.group_bounds``.
    """
    first = tl.load(groups + row, mask=row >= 0, other=0)
    count = tl.load(groups + row + 1, mask=row >= 0, other=0) - first
    # In the type of `groups`, which is chosen so that nothing overflows.
    number = ((before.to(count.dtype) + 1) * count - 1) // tl.maximum(length, 1).to(count.dtype)
    scale = tl.load(scales + first + number, mask=inside, other=0)
    return stored.to(tl.float32) * (scale.to(tl.float32) / unit)


@triton.jit
def by_tiles(
    x, values, bits, indptr, scales, groups, out,
    n, rows, columns, x_n, x_c, unit,
    IS_SIGNS: tl.constexpr, IS_MASKED: tl.constexpr, IS_CODED: tl.constexpr,
    USES_DOT: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write ``x @ A.T``, decoding tiles of `R` rows and `C` columns of `A`.

    `bits` has one bit an entry, row after row as :func:`numpy.packbits` packs them: signs, or where
    there are values. A program counts the bits of its rows on its way to the right.
    """
    n_blocks = tl.cdiv(rows, R)
    r = (tl.program_id(0) % n_blocks) * R + tl.arange(0, R)
    s = ((tl.program_id(0) // n_blocks) * N + tl.arange(0, N)).to(tl.int64)
    is_row = r < rows
    row = tl.where(is_row, r, -1)[:, None].to(tl.int64)
    begin = tl.zeros((R, 1), tl.int64)
    length = tl.zeros((R, 1), tl.int64) + columns
    if IS_MASKED:
        begin = tl.load(indptr + row, mask=row >= 0, other=0)
        length = tl.load(indptr + row + 1, mask=row >= 0, other=0) - begin
    first = row * columns
    seen = tl.zeros((R, 1), tl.int32)
    total = tl.zeros((R, N), tl.float32)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        inside = is_row[:, None] & (c < columns)[None, :]
        before = c[None, :] + tl.zeros((R, 1), tl.int32)
        if IS_SIGNS or IS_MASKED:
            at = (first & 7).to(tl.int32) + c[None, :]
            byte = tl.load(bits + (first >> 3) + (at >> 3), mask=inside, other=0).to(tl.int32)
            bit = (byte >> (7 - (at & 7))) & 1
        if IS_SIGNS:
            tile = tl.where(inside, 2 * bit - 1, 0)
        else:
            if IS_MASKED:
                before = seen + tl.cumsum(bit, 1) - bit
                seen += tl.sum(bit, 1)[:, None]
                inside = inside & (bit != 0)
                tile = tl.load(values + begin + before, mask=inside, other=0)
            else:
                tile = tl.load(values + first + before, mask=inside, other=0)
            if IS_CODED:
                tile = _decode(tile, scales, groups, row, before, length, unit, inside)
        samples = tl.load(
            x + s[None, :] * x_n + c[:, None] * x_c,
            mask=(c < columns)[:, None] & (s < n)[None, :], other=0,
        )  # fmt: skip
        if USES_DOT:
            total = tl.dot(tile.to(samples.dtype), samples, total, input_precision=PRECISION)
        else:
            products = tile.to(tl.float32)[:, :, None] * samples.to(tl.float32)[None, :, :]
            total += tl.sum(products, 1)
    tl.store(
        out + s[None, :] * rows + r[:, None],
        total.to(out.dtype.element_ty), mask=is_row[:, None] & (s < n)[None, :],
    )  # fmt: skip


@triton.jit
def by_rows(
    x, values, indices, indptr, scales, groups, out,
    n, rows, x_n, x_c, unit,
    IS_NARROW: tl.constexpr, IS_CODED: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write ``x @ A.T`` for compressed sparse rows, `K` values of `R` rows at a time.

    Narrow indices are unsigned numbers of 16 bits, given as signed ones.
    """
    n_blocks = tl.cdiv(rows, R)
    r = (tl.program_id(0) % n_blocks) * R + tl.arange(0, R)
    s = ((tl.program_id(0) // n_blocks) * N + tl.arange(0, N)).to(tl.int64)
    is_row = r < rows
    row = tl.where(is_row, r, -1)[:, None].to(tl.int64)
    begin = tl.load(indptr + row, mask=row >= 0, other=0)
    length = tl.load(indptr + row + 1, mask=row >= 0, other=0) - begin
    total = tl.zeros((R, N), tl.float32)
    longest = tl.max(length.to(tl.int32))
    for start in range(0, longest, K):
        before = start + tl.arange(0, K)[None, :] + tl.zeros((R, 1), tl.int32)
        inside = before < length
        place = begin + before
        c = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        if IS_NARROW:
            c = c & 0xFFFF
        value = tl.load(values + place, mask=inside, other=0)
        if IS_CODED:
            value = _decode(value, scales, groups, row, before, length, unit, inside)
        samples = tl.load(
            x + s[None, None, :] * x_n + c[:, :, None] * x_c,
            mask=inside[:, :, None] & (s < n)[None, None, :], other=0,
        )  # fmt: skip
        total += tl.sum(value.to(tl.float32)[:, :, None] * samples.to(tl.float32), 1)
    tl.store(
        out + s[None, :] * rows + r[:, None],
        total.to(out.dtype.element_ty), mask=is_row[:, None] & (s < n)[None, :],
    )  # fmt: skip
