"""Fourier transforms and convolutions as chains of Kronecker-sparse factors.

Values have the shape (a, d, b, c) of `matfact.operators.KroneckerSparseFactor`. They are
computed on the host, in double precision.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import scipy.fft

from matfact.solvers.chains import digit_reversal, prime_factors


def radices(n: int) -> list[int]:
    """Return the radices of the Fourier transform of length `n`, at least one."""
    return prime_factors(n) or [1]


def fourier_nnz(n: int) -> int:
    """Return the number of stored values of the mixed-radix Fourier transform of length `n`."""
    return n * sum(radices(n))


def root_of_unity(numerator: np.ndarray, denominator: int) -> np.ndarray:
    """Return ``exp(−2πi numerator / denominator)`` for integers, with exact angle reduction."""
    angle = 2 * np.pi * (numerator % denominator) / denominator
    return np.cos(angle) - 1j * np.sin(angle)


def fourier(n: int) -> list[np.ndarray]:
    """Return the factors of the Fourier transform of inputs in digit-reversed order.

    Source: J. W. Cooley, J. W. Tukey, "An algorithm for the machine calculation of complex
    Fourier series", Math. Comp. 19, 1965.
    """
    values, a, d = [], 1, n
    for p in radices(n):
        d //= p
        # Row k₁ d + k₂ and column j of the butterfly that joins p transforms of length d.
        k2, k1, j = np.ogrid[:d, :p, :p]
        values.append(np.tile(root_of_unity(j * (k1 * d + k2), p * d), (a, 1, 1, 1)))
        a *= p
    return values


def convolution(c: np.ndarray) -> list[np.ndarray]:
    """Return the factors of the circulant matrix with first column `c`.

    A butterfly chain followed by a reversed one, with the two middle factors, which have equal
    supports, multiplied together: a matrix ``B₁ B₂*`` in the sense of T. Dao et al., "Kaleidoscope:
    an efficient, learnable representation for all structured linear maps", ICLR 2020.
    """
    n, spectrum = len(c), scipy.fft.fft(c.astype(np.result_type(c, np.float64)))
    first, *rest = fourier(n)
    _, d, p, _ = first.shape
    eigenvalues = (spectrum / n).reshape(p, d).T[None, :, :, None]
    middle = _adjoint(first) @ (eigenvalues * first)
    # The input orders of the transforms cancel the digit reversals in each factor.
    up = [*map(_adjoint, reversed(rest)), middle, *rest]
    return [_digits_reversed(v, n) for v in up]


def _adjoint(values: np.ndarray) -> np.ndarray:
    return np.conj(np.swapaxes(values, -1, -2))


def _digits_reversed(values: np.ndarray, n: int) -> np.ndarray:
    """Return the factor `values` with the digits of rows and columns reversed."""
    digits, n_before = radices(n), 0
    while math.prod(digits[:n_before]) < values.shape[0]:
        n_before += 1
    before, after = digits[:n_before], digits[n_before + 1 :]
    orders = np.ix_(digit_reversal(after[::-1]), digit_reversal(before[::-1]))
    return np.ascontiguousarray(values.swapaxes(0, 1)[orders])


def real_part(values: list[np.ndarray]) -> list[np.ndarray]:
    """Return real factors of the real part of a product, or of its action on real inputs.

    Each complex number becomes a 2×2 block. The digit for real and imaginary parts is next to the
    digit that two neighbours share, so the factors stay Kronecker-sparse.

    Parameters
    ----------
    values : list of ndarray of shape (a, d, b, c)
        Factors in chains with growing or shrinking `a`.
    """
    growing = [v.shape[0] <= w.shape[0] for v, w in itertools.pairwise(values)]
    result = []
    for i, v in enumerate(values):
        a, d, b, c = v.shape
        blocks = np.array([[v.real, -v.imag], [v.imag, v.real]])  # (2, 2, a, d, b, c)
        blocks = blocks if i else blocks[:1]
        blocks = blocks if i < len(growing) else blocks[:, :1]
        rows = (0, 4) if not i or growing[i - 1] else (4, 0)
        columns = (5, 1) if i == len(growing) or growing[i] else (1, 5)
        height, width = b * blocks.shape[0], c * blocks.shape[1]
        result.append(blocks.transpose(2, 3, *rows, *columns).reshape(a, d, height, width))
    return result
