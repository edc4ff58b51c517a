"""Products to apply, and methods to apply them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse

from benchmarks import machine
from benchmarks.peers import has_lazylinop, has_pyfaust, quietly
from matfact import transforms
from matfact.operators import (
    DenseFactor,
    Factor,
    FactorProduct,
    KroneckerSparseFactor,
    QuantizedFactor,
    SignFactor,
    SparseFactor,
)
from matfact.operators._quantized import group_bounds

Structure = Callable[..., FactorProduct]
Apply = Callable[[Any], Any]


def two_sparse(n: int, rng: np.random.RandomState, density: float = 0.25) -> FactorProduct:
    """Return two random sparse factors that share the stored values."""
    per_factor = round(density * n * n / 2)
    return FactorProduct([_sparse(n, per_factor, rng) for _ in range(2)])


def _sparse(n: int, nnz: int, rng: np.random.RandomState) -> SparseFactor:
    places = np.sort(rng.permutation(n * n)[:nnz]) if n <= 2048 else _spread(n, nnz, rng)
    indptr = np.searchsorted(places, np.arange(n + 1) * n)
    values = rng.standard_normal(nnz).astype(np.float32)
    return SparseFactor(values, (places % n).astype(np.int32), indptr.astype(np.int64), n)


def _spread(n: int, nnz: int, rng: np.random.RandomState) -> np.ndarray:
    """Return one random position in each of `nnz` equal intervals, which is fast for large n."""
    edges = np.linspace(0, n * n, nnz + 1).astype(np.int64)
    return edges[:-1] + (rng.random_sample(nnz) * np.diff(edges)).astype(np.int64)


def _kronecker(pattern: tuple[int, int, int, int], rng: np.random.RandomState) -> Any:
    a, b, c, d = pattern
    values = rng.standard_normal((a, d, b, c)) / np.sqrt(c)
    return KroneckerSparseFactor(values.astype(np.float32))


def butterfly(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return log₂ n butterfly factors with random values."""
    levels = n.bit_length() - 1
    patterns = [(1 << i, 2, 2, n >> (i + 1)) for i in range(levels)]
    return FactorProduct([_kronecker(pattern, rng) for pattern in patterns])


def cosine(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return the discrete cosine transform."""
    return transforms.dct(n, dtype=np.float32)


def fourier(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return the discrete Fourier transform."""
    return transforms.dft(n, dtype=np.complex64)


def monarch(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return two Kronecker-sparse factors with blocks of about √n."""
    p = 1 << (n.bit_length() - 1) // 2
    return FactorProduct(
        [_kronecker((1, p, p, n // p), rng), _kronecker((p, n // p, n // p, 1), rng)]
    )


def block_diagonal(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return eight dense blocks on the diagonal."""
    return FactorProduct([_kronecker((8, n // 8, n // 8, 1), rng)])


def low_rank(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return two dense factors with a quarter of the entries."""
    left, right = rng.standard_normal((2, n, n // 8)).astype(np.float32)
    return FactorProduct([DenseFactor(left), DenseFactor(np.ascontiguousarray(right.T))])


def quantized(
    n: int, rng: np.random.RandomState, density: float = 0.25, bits: int = 8
) -> FactorProduct:
    """Return two random sparse factors with values of few bits."""
    return FactorProduct([_quantized(f, rng, bits) for f in two_sparse(n, rng, density)])


def dense_quantized(n: int, rng: np.random.RandomState, bits: int = 8) -> FactorProduct:
    """Return a dense matrix with values of few bits."""
    return FactorProduct([_quantized(DenseFactor(np.ones((n, n), np.float32)), rng, bits)])


def _quantized(pattern: Factor, rng: np.random.RandomState, bits: int) -> QuantizedFactor:
    top, size = 2 ** (bits - 1), 64
    levels = rng.randint(1 - top, top, pattern.values.shape).astype(np.int8)
    scales = rng.random_sample(len(group_bounds(pattern, size)) - 1).astype(np.float32)
    return QuantizedFactor(levels, scales, bits, size, pattern)


def double_binary(n: int, rng: np.random.RandomState) -> FactorProduct:
    """Return two matrices of signs between three diagonals: two bits an entry."""

    def diagonal() -> KroneckerSparseFactor:
        return KroneckerSparseFactor(rng.random_sample((1, n, 1, 1)).astype(np.float32))

    left, right = (
        SignFactor.from_dense(rng.standard_normal((n, n)).astype(np.float32)) for _ in range(2)
    )
    return FactorProduct([diagonal(), left, diagonal(), right, diagonal()])


STRUCTURES: dict[str, Structure] = {
    "sparse 25 %": two_sparse,
    "sparse 10 %": functools.partial(two_sparse, density=0.1),
    "butterfly": butterfly,
    "Monarch": monarch,
    "block-diagonal": block_diagonal,
    "low rank": low_rank,
    "DCT": cosine,
    "DFT": fourier,
    "sparse 25 %, 8 bits": quantized,
    "sparse 50 %, 8 bits": functools.partial(quantized, density=0.5),
    "sparse 25 %, 4 bits": functools.partial(quantized, bits=4),
    "sparse 50 %, 4 bits": functools.partial(quantized, density=0.5, bits=4),
    "dense, 8 bits": dense_quantized,
    "double binary": double_binary,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """Method to apply a product.

    Attributes
    ----------
    name : str
        Name in tables.
    prepare : callable
        ``prepare(product, matrix)`` returns the function of the operand to time; `matrix` is a
        dense matrix with the shape and dtype of the product.
    is_present : callable
        Whether its requirements are installed.
    suits : callable
        Whether to measure it for a structure, given by name.
    operand : callable
        Turns the NumPy operand into what the method takes.
    is_exact : bool
        Whether it applies these factors, and not others to compare with.
    """

    name: str
    prepare: Callable[[FactorProduct, np.ndarray], Apply]
    is_present: Callable[[], bool] = lambda: True
    suits: Callable[[str], bool] = lambda structure: True
    operand: Callable[[np.ndarray], Any] = lambda X: X
    is_exact: bool = True


def _in_turn(matrices: list[Any]) -> Apply:
    """Return the product of `matrices` with an operand, from right to left."""

    def apply(X: Any) -> Any:
        for matrix in reversed(matrices):
            X = matrix @ X
        return X

    return apply


def dense(product: FactorProduct, matrix: np.ndarray) -> Apply:
    return matrix.__matmul__


def ours(product: FactorProduct, matrix: np.ndarray) -> Apply:
    return product.__matmul__


def decoded(product: FactorProduct, matrix: np.ndarray) -> Apply:
    return FactorProduct([factor.decoded() for factor in product]).__matmul__


def sparse_instead(product: FactorProduct, matrix: np.ndarray) -> Apply:
    """Apply two sparse factors of other values, a quarter of the entries."""
    return two_sparse(len(matrix), np.random.RandomState(len(matrix))).__matmul__


def plain(product: FactorProduct, matrix: np.ndarray) -> Apply:
    """Apply factors one after the other, with the operations of NumPy and SciPy."""

    def apply(X: np.ndarray) -> np.ndarray:
        for factor in reversed(product.factors):
            X = factor.apply(X)
        return X

    return apply


def scipy_csr(product: FactorProduct, matrix: np.ndarray) -> Apply:
    return _in_turn([_as_scipy(f) for f in product])


def _as_scipy(factor: Factor) -> scipy.sparse.csr_array:
    if isinstance(factor, SparseFactor):
        parts = (factor.values, factor.indices, factor.indptr)
        return scipy.sparse.csr_array(parts, shape=factor.shape)
    return scipy.sparse.csr_array(factor.toarray())


def torch_csr(product: FactorProduct, matrix: np.ndarray) -> Apply:
    import torch

    factors = [_as_scipy(factor) for factor in product]
    arrays = [[torch.from_numpy(a) for a in (f.indptr, f.indices, f.data)] for f in factors]
    return _in_turn(
        [
            torch.sparse_csr_tensor(*parts, size=factor.shape)
            for parts, factor in zip(arrays, factors, strict=True)
        ]
    )


def torch_dense(product: FactorProduct, matrix: np.ndarray) -> Apply:
    import torch

    return torch.from_numpy(matrix).__matmul__


def to_torch(X: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(X)


def faust(product: FactorProduct, matrix: np.ndarray) -> Apply:
    factors = [scipy.sparse.csr_matrix(_as_scipy(factor)) for factor in product]
    return quietly("pyfaust").Faust(factors).__matmul__


def lazylinop_ksm(product: FactorProduct, matrix: np.ndarray) -> Apply:
    """Use the values (a, d, b, c) of each factor in the order (a, b, c, d)."""
    values = [np.ascontiguousarray(np.transpose(f.values, (0, 2, 3, 1))) for f in product]
    return quietly("lazylinop.butterfly").ksm(values).__matmul__


def scipy_fft(product: FactorProduct, matrix: np.ndarray) -> Apply:
    transform = scipy.fft.fft if np.iscomplexobj(matrix) else scipy.fft.dct
    return lambda X: transform(X, axis=0)


def is_kronecker(structure: str) -> bool:
    """Whether all factors of a structure are Kronecker-sparse."""
    return structure in ("butterfly", "Monarch", "block-diagonal")


def has_torch() -> bool:
    """Whether torch is installed."""
    return machine.is_installed("torch")


def is_sparse(structure: str) -> bool:
    """Whether the factors have zeros and the values are real."""
    return structure not in ("low rank", "DFT") and not is_coded(structure)


def is_coded(structure: str) -> bool:
    """Whether values take few bits."""
    return is_quantized(structure) or structure == "double binary"


def is_quantized(structure: str) -> bool:
    """Whether values are small integers with scales."""
    return structure.endswith("bits")


def is_transform(structure: str) -> bool:
    """Whether SciPy has the same transform."""
    return structure in ("DCT", "DFT")


METHODS = (
    Method("dense (BLAS)", dense, is_exact=False),
    Method("matfact", ours),
    Method("matfact, 32 bits", decoded, suits=is_quantized),
    Method(
        "matfact, sparse 25 %", sparse_instead, suits=lambda s: s == "double binary", is_exact=False
    ),
    Method("matfact, plain NumPy", plain, suits=lambda s: not is_coded(s)),
    Method("scipy CSR", scipy_csr, suits=is_sparse),
    Method("torch dense", torch_dense, has_torch, lambda s: s != "DFT", to_torch, False),
    Method("torch CSR", torch_csr, has_torch, is_sparse, to_torch),
    Method("lazylinop ksm", lazylinop_ksm, has_lazylinop, is_kronecker),
    Method("pyfaust", faust, has_pyfaust, is_sparse, np.asfortranarray),
    Method("scipy.fft", scipy_fft, suits=is_transform),
)
