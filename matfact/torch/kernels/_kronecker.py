"""Triton kernels for Kronecker-sparse factors: products and gradients of their values.

The factor has values of shape (a, d, b, c): block ``(i, j)`` of shape (b, c) maps features
``(i, :, j)`` of inputs, which are of shape (a, c, d), to those of outputs of shape (a, b, d).
Nothing is permuted in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(number, a, d, b, D: tl.constexpr, B: tl.constexpr):
    """Return where the tile of a program begins: in a, d, b and in what is left."""
    d_tiles, b_tiles = tl.cdiv(d, D), tl.cdiv(b, B)
    rest = number // d_tiles
    i = rest // b_tiles
    return i % a, (number % d_tiles) * D, (rest % b_tiles) * B, i // a


@triton.jit
def sums(
    x, values, out, n, a, d, b, c, x_n, x_f, v_a, v_d, v_b, v_c, out_n, out_f,
    D: tl.constexpr, B: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the product for small blocks or few samples, as sums of products."""
    i, d0, b0, block = _place(tl.program_id(0), a, d, b, D, B)
    j, k = d0 + tl.arange(0, D), b0 + tl.arange(0, B)
    s = (block * N + tl.arange(0, N)).to(tl.int64)
    total = tl.zeros((D, B, N), tl.float32)
    for start in range(0, c, C):
        m = start + tl.arange(0, C)
        v = tl.load(
            values + i * v_a + j[:, None, None] * v_d + k[None, :, None] * v_b
            + m[None, None, :] * v_c,
            mask=(j < d)[:, None, None] & (k < b)[None, :, None] & (m < c)[None, None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        feature = (i * c + m)[None, :, None] * d + j[:, None, None]
        samples = tl.load(
            x + s[None, None, :] * x_n + feature.to(tl.int64) * x_f,
            mask=(j < d)[:, None, None] & (m < c)[None, :, None] & (s < n)[None, None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        total += tl.sum(v[:, :, :, None] * samples[:, None, :, :], 2)
    feature = (i * b + k)[None, :, None] * d + j[:, None, None]
    tl.store(
        out + s[None, None, :] * out_n + feature.to(tl.int64) * out_f,
        total.to(out.dtype.element_ty),
        mask=(j < d)[:, None, None] & (k < b)[None, :, None] & (s < n)[None, None, :],
    )


@triton.jit
def dots(
    x, values, out, n, a, d, b, c, x_n, x_f, v_a, v_d, v_b, v_c, out_n, out_f,
    PRECISION: tl.constexpr, B: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the product for large blocks and many samples, by tensor cores."""
    i, j, b0, block = _place(tl.program_id(0), a, d, b, 1, B)
    k = b0 + tl.arange(0, B)
    s = (block * N + tl.arange(0, N)).to(tl.int64)
    total = tl.zeros((B, N), tl.float32)
    for start in range(0, c, C):
        m = start + tl.arange(0, C)
        v = tl.load(
            values + i * v_a + j * v_d + k[:, None] * v_b + m[None, :] * v_c,
            mask=(k < b)[:, None] & (m < c)[None, :], other=0,
        )  # fmt: skip
        feature = ((i * c + m) * d + j).to(tl.int64)
        samples = tl.load(
            x + s[None, :] * x_n + feature[:, None] * x_f,
            mask=(m < c)[:, None] & (s < n)[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(v, samples, total, input_precision=PRECISION)
    feature = ((i * b + k) * d + j).to(tl.int64)
    tl.store(
        out + s[None, :] * out_n + feature[:, None] * out_f,
        total.to(out.dtype.element_ty), mask=(k < b)[:, None] & (s < n)[None, :],
    )  # fmt: skip


@triton.jit
def gradient_sums(
    x, grad, out, n, span, a, d, b, c, x_n, x_f, g_n, g_f,
    D: tl.constexpr, B: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the values of small blocks, as sums of products.

    Each `span` of samples has a gradient of its own, so that there are enough programs.
    """
    i, d0, b0, block = _place(tl.program_id(0), a, d, b, D, B)
    part = block // tl.cdiv(c, C)
    j, k = d0 + tl.arange(0, D), b0 + tl.arange(0, B)
    m = (block % tl.cdiv(c, C)) * C + tl.arange(0, C)
    of_x = ((i * c + m)[None, :] * d + j[:, None])[:, :, None].to(tl.int64)
    of_grad = ((i * b + k)[None, :] * d + j[:, None])[:, :, None].to(tl.int64)
    in_x = ((j < d)[:, None] & (m < c)[None, :])[:, :, None]
    in_grad = ((j < d)[:, None] & (k < b)[None, :])[:, :, None]
    total = tl.zeros((D, B, C), tl.float32)
    for start in range(part * span, min(n, (part + 1) * span), N):
        s = (start + tl.arange(0, N)).to(tl.int64)[None, None, :]
        samples = tl.load(x + s * x_n + of_x * x_f, mask=in_x & (s < n), other=0).to(tl.float32)
        g = tl.load(grad + s * g_n + of_grad * g_f, mask=in_grad & (s < n), other=0)
        total += tl.sum(g.to(tl.float32)[:, :, None, :] * samples[:, None, :, :], 3)
    place = (((part * a + i) * d + j)[:, None, None] * b + k[None, :, None]).to(tl.int64) * c + m[
        None, None, :
    ]
    inside = (j < d)[:, None, None] & (k < b)[None, :, None] & (m < c)[None, None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_dots(
    x, grad, out, n, span, a, d, b, c, x_n, x_f, g_n, g_f,
    PRECISION: tl.constexpr, B: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the values of large blocks, by tensor cores."""
    i, j, b0, block = _place(tl.program_id(0), a, d, b, 1, B)
    part = block // tl.cdiv(c, C)
    k, m = b0 + tl.arange(0, B), (block % tl.cdiv(c, C)) * C + tl.arange(0, C)
    of_x = ((i * c + m) * d + j).to(tl.int64)
    of_grad = ((i * b + k) * d + j).to(tl.int64)
    total = tl.zeros((B, C), tl.float32)
    for start in range(part * span, min(n, (part + 1) * span), N):
        s = (start + tl.arange(0, N)).to(tl.int64)
        samples = tl.load(
            x + s[:, None] * x_n + of_x[None, :] * x_f,
            mask=(s < n)[:, None] & (m < c)[None, :], other=0,
        )  # fmt: skip
        g = tl.load(
            grad + s[None, :] * g_n + of_grad[:, None] * g_f,
            mask=(k < b)[:, None] & (s < n)[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(g, samples, total, input_precision=PRECISION)
    place = (((part * a + i) * d + j) * b + k[:, None]).to(tl.int64) * c + m[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(k < b)[:, None] & (m < c)[None, :])
