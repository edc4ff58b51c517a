"""Fast transforms of any length as exact products with O(n log n) stored values.

All are built from the complex transform ``E[k, j] = exp(−2πi k j / N)`` as a chain of
Kronecker-sparse factors: a mixed-radix Fourier transform if N has only small prime factors, else a
convolution with a chirp (Bluestein). Real transforms are real parts of complex ones; their factors
are real, with 2×2 blocks for complex numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import numpy as np
import scipy.fft

from matfact.operators import Factor, FactorProduct, KroneckerSparseFactor, SelectionFactor
from matfact.solvers.chains import digit_reversal, even_odd
from matfact.solvers.fourier import (
    convolution,
    fourier,
    fourier_nnz,
    radices,
    real_part,
    root_of_unity,
)

__all__ = ["circulant", "dct", "dft", "dst", "hadamard", "toeplitz"]

Norm = Literal["backward", "ortho"]


def hadamard(n: int, *, norm: Norm = "backward", dtype: Any = np.float64) -> FactorProduct:
    """Return the Hadamard transform in Sylvester order, like ``scipy.linalg.hadamard``.

    Parameters
    ----------
    n : int
        Length, a power of two.
    norm : {"backward", "ortho"}, default="backward"
        Entries ±1, or ±1/√n so that the transform is orthogonal.
    dtype : dtype, default=float64
        Floating dtype of the factors.

    Returns
    -------
    FactorProduct
        log₂ n butterfly factors with 2 n stored values each.

    Examples
    --------
    >>> from matfact.transforms import hadamard
    >>> hadamard(4).toarray()
    array([[ 1.,  1.,  1.,  1.],
           [ 1., -1.,  1., -1.],
           [ 1.,  1., -1., -1.],
           [ 1., -1., -1.,  1.]])
    """
    _check(n, norm)
    if n & (n - 1):
        raise ValueError(f"n must be a power of two, got {n}.")
    block = np.array([[1.0, 1.0], [1.0, -1.0]])
    values = [np.tile(block, (1 << i, n >> (i + 1), 1, 1)) for i in range(n.bit_length() - 1)]
    values = values or [np.ones((1, 1, 1, 1))]
    if norm == "ortho":
        values[0] = values[0] / np.sqrt(n)
    return FactorProduct([KroneckerSparseFactor(v.astype(dtype)) for v in values])


def dft(n: int, *, norm: Norm = "backward", dtype: Any = np.complex128) -> FactorProduct:
    """Return the discrete Fourier transform, like ``scipy.fft.fft``.

    The inverse is the conjugate, ``dft(n, norm="ortho").conj()`` for the orthonormal transform, and
    the conjugate divided by n for ``norm="backward"``.

    Parameters
    ----------
    n : int
        Length. Large prime factors require a convolution of more than twice the length.
    norm : {"backward", "ortho"}, default="backward"
        No scaling, or 1/√n so that the transform is unitary.
    dtype : dtype, default=complex128
        Complex dtype of the factors.

    Returns
    -------
    FactorProduct
        One factor with n p stored values for each prime factor p of n, and a permutation.

    References
    ----------
    - J. W. Cooley, J. W. Tukey, "An algorithm for the machine calculation of complex Fourier
      series", Math. Comp. 19, 1965.
    - L. Bluestein, "A linear filtering approach to the computation of discrete Fourier
      transform", IEEE Trans. Audio Electroacoustics 18(4), 1970.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.transforms import dft
    >>> x = np.arange(12.0)
    >>> bool(np.allclose(dft(12) @ x, np.fft.fft(x))), dft(12).nnz
    (True, 84)
    """
    _check(n, norm)
    transform = _exponential(n, n)
    scale = 1 / np.sqrt(n) if norm == "ortho" else 1.0
    return transform.scaled(np.full(n, scale), np.ones(n)).product(dtype)


def dct(
    n: int, type: int = 2, *, norm: Norm = "backward", dtype: Any = np.float64
) -> FactorProduct:
    """Return a discrete cosine transform, like ``scipy.fft.dct``.

    Parameters
    ----------
    n : int
        Length, at least 2 for type 1.
    type : {1, 2, 3, 4}, default=2
        Type of the transform. Types 2 and 3 use a Fourier transform of length n, types 1 and 4
        one of about twice the length.
    norm : {"backward", "ortho"}, default="backward"
        SciPy's scaling, or the orthogonal transform (including type 1, like SciPy with its default
        ``orthogonalize=True``).
    dtype : dtype, default=float64
        Floating dtype of the factors.

    Returns
    -------
    FactorProduct
        The transform.

    References
    ----------
    - J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP
      28(1), 1980.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.fft
    >>> from matfact.transforms import dct
    >>> x = np.arange(5.0)
    >>> bool(np.allclose(dct(5, norm="ortho") @ x, scipy.fft.dct(x, norm="ortho")))
    True
    """
    _check(n, norm, type)
    if type == 1:
        return _dct1(n, norm).product(dtype, real=True)
    product = _cosine(n, type, norm).product(dtype, real=True)
    return product.T if type == 3 else product


def dst(
    n: int, type: int = 2, *, norm: Norm = "backward", dtype: Any = np.float64
) -> FactorProduct:
    """Return a discrete sine transform, like ``scipy.fft.dst``.

    Parameters
    ----------
    n : int
        Length.
    type : {1, 2, 3, 4}, default=2
        Type of the transform.
    norm : {"backward", "ortho"}, default="backward"
        SciPy's scaling, or the orthogonal transform.
    dtype : dtype, default=float64
        Floating dtype of the factors.

    Returns
    -------
    FactorProduct
        The transform, at the cost of `dct`.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.fft
    >>> from matfact.transforms import dst
    >>> x = np.arange(5.0)
    >>> bool(np.allclose(dst(5) @ x, scipy.fft.dst(x)))
    True
    """
    _check(n, norm, type)
    if type == 1:
        return _dst1(n, norm).product(dtype, real=True)
    # sin(π(k+½)(j+½)/n) is (−1)ʲ times the cosine with index n − 1 − k; likewise for type 2.
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    cosine = _cosine(n, type, norm).scaled(np.ones(n), signs)
    product = dataclasses.replace(cosine, rows=cosine.rows[::-1]).product(dtype, real=True)
    return product.T if type == 3 else product


def circulant(c: Any, *, dtype: Any = None) -> FactorProduct:
    """Return the circulant matrix with first column `c`, like ``scipy.linalg.circulant``.

    Parameters
    ----------
    c : array-like of shape (n,)
        First column, real or complex; ``circulant(c) @ x`` is the circular convolution.
    dtype : dtype, optional
        Dtype of the factors. By default that of `c`, or float64 for integers.

    Returns
    -------
    FactorProduct
        ``Fᴴ diag(F c) F / n``, with real factors if `c` is real. If n has a large prime factor, the
        matrix is embedded in a larger circulant.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.transforms import circulant
    >>> circulant([1.0, 2.0, 3.0]).toarray().round(12)
    array([[1., 3., 2.],
           [2., 1., 3.],
           [3., 2., 1.]])
    """
    c = _vector(c, "c")
    longer = scipy.fft.next_fast_len(2 * len(c) - 1, real=True)
    if fourier_nnz(len(c)) > fourier_nnz(longer):
        return toeplitz(c, np.roll(c[::-1], 1), dtype=dtype)
    every = np.arange(len(c))
    transform = _Transform(convolution(c), every, every)
    return transform.product(_result_dtype(c, dtype), real=np.isrealobj(c))


def toeplitz(c: Any, r: Any = None, *, dtype: Any = None) -> FactorProduct:
    """Return the Toeplitz matrix with first column `c` and first row `r`.

    Parameters
    ----------
    c : array-like of shape (m,)
        First column.
    r : array-like of shape (n,), optional
        First row; its first entry is ignored, as in ``scipy.linalg.toeplitz``. By default the
        conjugate of `c`.
    dtype : dtype, optional
        Dtype of the factors. By default that of `c` and `r`, or float64 for integers.

    Returns
    -------
    FactorProduct
        Part of a circulant with at least m + n − 1 rows, with real factors if `c` and `r` are real.

    Examples
    --------
    >>> from matfact.transforms import toeplitz
    >>> toeplitz([1.0, 2.0], [1.0, 5.0, 6.0]).toarray().round(12)
    array([[1., 5., 6.],
           [2., 1., 5.]])
    """
    c = _vector(c, "c")
    r = np.conj(c) if r is None else _vector(r, "r")
    both = np.concatenate([c, r])
    return _toeplitz(c, r).product(_result_dtype(both, dtype), real=np.isrealobj(both))


@dataclasses.dataclass(frozen=True)
class _Transform:
    """Selected rows and columns of a product of complex Kronecker-sparse factors.

    Parameters
    ----------
    values : list of ndarray of shape (a, d, b, c)
        Values of the factors.
    rows, columns : ndarray of int
        Position of each output (input) among the rows (columns) of the product.
    """

    values: list[np.ndarray]
    rows: np.ndarray
    columns: np.ndarray

    def scaled(self, row_scales: np.ndarray, column_scales: np.ndarray) -> Self:
        """Scale the outputs and the inputs by two vectors."""
        values = list(self.values)
        a, d, b, _ = values[0].shape
        scales = _spread(row_scales, self.rows, a * b * d).reshape(a, b, d)
        values[0] = values[0] * scales.transpose(0, 2, 1)[:, :, :, None]
        a, d, _, c = values[-1].shape
        scales = _spread(column_scales, self.columns, a * c * d).reshape(a, c, d)
        values[-1] = values[-1] * scales.transpose(0, 2, 1)[:, :, None, :]
        return dataclasses.replace(self, values=values)

    def product(self, dtype: Any, *, real: bool = False) -> FactorProduct:
        """Return the product in `dtype`, or its real part, the output for real inputs."""
        values = real_part(self.values) if real else self.values
        factors: list[Factor] = [KroneckerSparseFactor(v.astype(dtype)) for v in values]
        height, width = factors[0].shape[0], factors[-1].shape[1]
        like = factors[0].values
        if not np.array_equal(self.rows, np.arange(height)):
            factors.insert(0, SelectionFactor.from_index(self.rows, height, like))
        if not np.array_equal(self.columns, np.arange(width)):
            gather = SelectionFactor.from_index(self.columns, width, like)
            factors.append(gather.T)
        return FactorProduct(factors)


def _spread(scales: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Return a vector of zeros with `scales` at `places`."""
    spread = np.zeros(length, dtype=scales.dtype)
    spread[places] = scales
    return spread


def _places(n: int) -> np.ndarray:
    """Return the position of each input in digit-reversed order."""
    return np.argsort(digit_reversal(radices(n)))


def _toeplitz(c: np.ndarray, r: np.ndarray) -> _Transform:
    """Return the Toeplitz matrix of first column `c` and first row `r`."""
    n = scipy.fft.next_fast_len(len(c) + len(r) - 1, real=True)
    gap = np.zeros(n - len(c) - len(r) + 1)
    factors = convolution(np.concatenate([c, gap, r[:0:-1]]))
    return _Transform(factors, np.arange(len(c)), np.arange(len(r)))


def _exponential(size: int, n: int) -> _Transform:
    """Return ``exp(−2πi k j / n)`` for k and j below `size`, by the cheaper algorithm."""
    convolved = scipy.fft.next_fast_len(2 * size - 1, real=True)
    if fourier_nnz(n) <= 2 * fourier_nnz(convolved):
        return _Transform(fourier(n), np.arange(size), _places(n)[:size])
    # k j = (k² + j² − (k − j)²) / 2
    chirp = root_of_unity(np.arange(size) ** 2, 2 * n)
    return _toeplitz(np.conj(chirp), np.conj(chirp)).scaled(chirp, chirp)


def _cosine(n: int, type: int, norm: Norm) -> _Transform:
    """Return the cosine transform of type 2 or 4, or the transpose of type 3."""
    k, ones = np.arange(n), np.ones(n)
    rows = 2 * root_of_unity(2 * k + 1 if type == 4 else k, 8 * n if type == 4 else 4 * n)
    if norm == "ortho":
        rows = rows / np.sqrt(2 * n)
    if type == 4:
        return _exponential(n, 2 * n).scaled(rows, root_of_unity(k, 4 * n))
    if norm == "ortho":
        rows[0] /= np.sqrt(2)
    elif type == 3:
        rows[0] /= 2
    transform = _exponential(n, n).scaled(rows, ones)
    columns = np.empty_like(transform.columns)
    columns[even_odd(n)] = transform.columns
    return dataclasses.replace(transform, columns=columns)


def _dct1(n: int, norm: Norm) -> _Transform:
    """Return the cosine transform of type 1: ``cos(π k j / (n − 1))`` with weighted ends."""
    if n < 2:
        raise ValueError(f"n must be at least 2 for the cosine transform of type 1, got {n}.")
    rows, columns = np.ones(n), np.full(n, 2.0)
    columns[[0, -1]] = 1.0
    if norm == "ortho":
        rows[[0, -1]] = columns[[0, -1]] = np.sqrt(0.5)
        columns[1:-1] = 1.0
        rows *= np.sqrt(2 / (n - 1))
    return _exponential(n, 2 * n - 2).scaled(rows, columns)


def _dst1(n: int, norm: Norm) -> _Transform:
    """Return the sine transform of type 1: ``sin(π (k + 1) (j + 1) / (n + 1))``."""
    k, scale = np.arange(n), np.sqrt(2 / (n + 1)) if norm == "ortho" else 2.0
    rows = scale * 1j * root_of_unity(k + 1, 2 * n + 2)
    return _exponential(n, 2 * n + 2).scaled(rows, root_of_unity(k, 2 * n + 2))


def _check(n: Any, norm: Any, type: Any = 2) -> None:
    """Raise ``ValueError`` unless the parameters of a transform are allowed."""
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be a positive integer, got {n!r}.")
    if norm not in ("backward", "ortho"):
        raise ValueError(f"norm must be 'backward' or 'ortho', got {norm!r}.")
    if type not in (1, 2, 3, 4):
        raise ValueError(f"type must be 1, 2, 3 or 4, got {type!r}.")


def _vector(values: Any, name: str) -> np.ndarray:
    """Return `values` as a finite vector of at least one entry."""
    vector = np.asarray(values)
    if vector.ndim != 1 or not vector.size or vector.dtype.kind not in "buifc":
        raise ValueError(
            f"{name} must be a vector of numbers with at least one entry, got shape "
            f"{vector.shape} and dtype {vector.dtype}."
        )
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} must be finite.")
    return vector


def _result_dtype(values: np.ndarray, dtype: Any) -> Any:
    """Return `dtype`, or by default that of `values` (float64 for integers)."""
    if dtype is not None:
        return dtype
    return values.dtype if values.dtype.kind in "fc" else np.float64
