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
def _write(
    total, out, scales, groups, r, s, is_row, n, rows, unit, HAS_ROW_SCALES: tl.constexpr
):  # fmt: skip
    """Write the products of rows `r` with samples `s`, times the scales of rows that have one."""
    if HAS_ROW_SCALES:
        total = _scale_rows(total, scales, groups, r, is_row, unit)
    tl.store(
        out + s[None, :] * rows + r[:, None],
        total.to(out.dtype.element_ty), mask=is_row[:, None] & (s < n)[None, :],
    )  # fmt: skip


@triton.jit
def _scale_rows(total, scales, groups, r, is_row, unit):
    """Multiply by the scale of each row, where all values of a row share one."""
    group = tl.load(groups + r, mask=is_row, other=0)
    has_one = is_row & (tl.load(groups + r + 1, mask=is_row, other=0) > group)
    scale = tl.load(scales + group, mask=has_one, other=0).to(tl.float32) / unit
    return total * scale[:, None]


@triton.jit
def _read_bits(
    bits, first, is_row, start, columns, seen,
    IS_ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return a tile of bits, how many of its row are set before each, and up to its end.

    `first` is the place of the row's first bit. Where rows begin at whole bytes, the bits of a byte
    are counted at once: each takes four bits of a word, which a product sums up from the last bit
    to the first.
    """
    if IS_ALIGNED:
        place = start // 8 + tl.arange(0, C // 8)[None, :]
        inside = is_row[:, None] & (place < columns // 8)
        word = tl.load(bits + (first >> 3) + place, mask=inside, other=0).to(tl.int32)
        word = (word | (word << 12)) & 0x000F000F
        word = (word | (word << 6)) & 0x03030303
        word = (word | (word << 3)) & 0x11111111
        sums = word * 0x11111111
        counts = (sums >> 28) & 15
        shift = 28 - 4 * tl.arange(0, 8)[None, None, :]
        bit = (word[:, :, None] >> shift) & 1
        before = (seen + tl.cumsum(counts, 1))[:, :, None] - ((sums[:, :, None] >> shift) & 15)
        bit = tl.reshape(bit, (R, C))
        before = tl.reshape(before, (R, C))
        seen += tl.sum(counts, 1)[:, None]
    else:
        c = start + tl.arange(0, C)[None, :]
        place = (first & 7).to(tl.int32) + c
        inside = is_row[:, None] & (c < columns)
        byte = tl.load(bits + (first >> 3) + (place >> 3), mask=inside, other=0).to(tl.int32)
        bit = (byte >> (7 - (place & 7))) & 1
        before = seen + tl.cumsum(bit, 1) - bit
        seen += tl.sum(bit, 1)[:, None]
    return bit, before, seen


@triton.jit
def by_tiles(
    x, values, bits, indptr, scales, groups, out,
    n, rows, columns, x_n, x_c, unit,
    IS_SIGNS: tl.constexpr, IS_MASKED: tl.constexpr,
    IS_CODED: tl.constexpr, IS_GROUPED: tl.constexpr,
    IS_ALIGNED: tl.constexpr, USES_DOT: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write ``x @ A.T``, decoding tiles of `R` rows and `C` columns of `A`.

    `bits` has one bit an entry, row after row as `numpy.packbits` packs them: signs, or where
    there are values. A program counts the bits of its rows on its way to the right.
    """
    n_blocks = tl.cdiv(rows, R)
    r = (tl.program_id(0) % n_blocks) * R + tl.arange(0, R)
    s = ((tl.program_id(0) // n_blocks) * N + tl.arange(0, N)).to(tl.int64)
    is_row = r < rows
    row = tl.where(is_row, r, -1)[:, None].to(tl.int64)
    first = row * columns
    begin = tl.zeros((R, 1), tl.int64)
    length = tl.zeros((R, 1), tl.int64) + columns
    if IS_MASKED:
        begin = tl.load(indptr + row, mask=row >= 0, other=0)
        length = tl.load(indptr + row + 1, mask=row >= 0, other=0) - begin
    seen = tl.zeros((R, 1), tl.int32)
    # Without tensor cores, sums over columns are left to the end.
    total = tl.zeros((R, N) if USES_DOT else (R, C, N), tl.float32)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        inside = is_row[:, None] & (c < columns)[None, :]
        before = c[None, :] + tl.zeros((R, 1), tl.int32)
        if IS_SIGNS or IS_MASKED:
            bit, before, seen = _read_bits(
                bits, first, is_row, start, columns, seen, IS_ALIGNED, R, C
            )
        if IS_SIGNS:
            tile = tl.where(inside, 2 * bit - 1, 0).to(tl.float32)
        else:
            if IS_MASKED:
                inside = bit != 0
                tile = tl.load(values + begin + before, mask=inside, other=0)
            else:
                tile = tl.load(values + first + before, mask=inside, other=0)
            if IS_GROUPED:
                tile = _decode(tile, scales, groups, row, before, length, unit, inside)
        samples = tl.load(
            x + s[None, :] * x_n + c[:, None].to(tl.int64) * x_c,
            mask=(c < columns)[:, None] & (s < n)[None, :], other=0,
        )  # fmt: skip
        if USES_DOT:
            total = tl.dot(tile.to(samples.dtype), samples, total, input_precision=PRECISION)
        else:
            total += tile.to(tl.float32)[:, :, None] * samples.to(tl.float32)[None, :, :]
    if not USES_DOT:
        total = tl.sum(total, 1)
    _write(
        total, out, scales, groups, r, s, is_row, n, rows, unit, IS_CODED and not IS_GROUPED
    )  # fmt: skip


@triton.jit
def by_rows(
    x, values, indices, indptr, scales, groups, out,
    n, rows, x_n, x_c, unit,
    IS_NARROW: tl.constexpr, IS_CODED: tl.constexpr, IS_GROUPED: tl.constexpr,
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
    total = tl.zeros((R, K, N), tl.float32)
    longest = tl.max(length.to(tl.int32))
    for start in range(0, longest, K):
        before = start + tl.arange(0, K)[None, :] + tl.zeros((R, 1), tl.int32)
        inside = before < length
        place = begin + before
        c = tl.load(indices + place, mask=inside, other=0).to(tl.int32)
        if IS_NARROW:
            c = c & 0xFFFF
        value = tl.load(values + place, mask=inside, other=0)
        if IS_GROUPED:
            value = _decode(value, scales, groups, row, before, length, unit, inside)
        samples = tl.load(
            x + s[None, None, :] * x_n + c[:, :, None].to(tl.int64) * x_c,
            mask=inside[:, :, None] & (s < n)[None, None, :], other=0,
        )  # fmt: skip
        total += value.to(tl.float32)[:, :, None] * samples.to(tl.float32)
    _write(
        tl.sum(total, 1),
        out,
        scales,
        groups,
        r,
        s,
        is_row,
        n,
        rows,
        unit,
        IS_CODED and not IS_GROUPED,
    )
