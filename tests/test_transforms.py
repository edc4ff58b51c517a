"""Ready-made transforms: equal to SciPy's to rounding, of any length, in O(n log n) values."""

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.operators import FactorProduct
from matfact.transforms import circulant, dct, dft, dst, hadamard, toeplitz

LENGTHS = st.one_of(st.integers(1, 80), st.sampled_from([97, 100, 128, 194, 210, 256]))
NORMS = st.sampled_from(["backward", "ortho"])
any_length = settings(deadline=None, max_examples=25)


def assert_close(product, expected):
    dense = product.toarray()
    eps = np.finfo(dense.dtype).eps
    assert dense.shape == expected.shape
    assert np.linalg.norm(dense - expected) <= 100 * eps * np.linalg.norm(expected)


@any_length
@given(LENGTHS, NORMS)
def test_dft_equals_that_of_scipy(n, norm):
    assert_close(dft(n, norm=norm), scipy.fft.fft(np.eye(n), axis=0, norm=norm))


@any_length
@given(LENGTHS, NORMS, st.sampled_from([1, 2, 3, 4]))
def test_dct_equals_that_of_scipy(n, norm, kind):
    if (n, kind) != (1, 1):
        assert_close(dct(n, kind, norm=norm), scipy.fft.dct(np.eye(n), kind, axis=0, norm=norm))


@any_length
@given(LENGTHS, NORMS, st.sampled_from([1, 2, 3, 4]))
def test_dst_equals_that_of_scipy(n, norm, kind):
    assert_close(dst(n, kind, norm=norm), scipy.fft.dst(np.eye(n), kind, axis=0, norm=norm))


@pytest.mark.parametrize("n", [1, 2, 8, 256])
def test_hadamard_equals_that_of_scipy_exactly(n):
    np.testing.assert_array_equal(hadamard(n).toarray(), scipy.linalg.hadamard(n))
    assert_close(hadamard(n, norm="ortho"), scipy.linalg.hadamard(n) / np.sqrt(n))


def vector(n, is_complex, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n) + (1j * rng.standard_normal(n) if is_complex else 0)


@any_length
@given(LENGTHS, st.booleans())
def test_circulant_equals_that_of_scipy_and_stays_real(n, is_complex):
    c = vector(n, is_complex, n)
    assert circulant(c).dtype == c.dtype
    assert_close(circulant(c), scipy.linalg.circulant(c))


@any_length
@given(LENGTHS, LENGTHS, st.booleans())
def test_toeplitz_equals_that_of_scipy_and_stays_real(rows, columns, is_complex):
    c, r = vector(rows, is_complex, 0), vector(columns, is_complex, 1)
    assert toeplitz(c, r).dtype == c.dtype
    assert_close(toeplitz(c, r), scipy.linalg.toeplitz(c, r))
    assert_close(toeplitz(c), scipy.linalg.toeplitz(c))


TRANSFORMS = {
    "hadamard": (hadamard, np.float32),
    "dft": (dft, np.complex64),
    "dct": (dct, np.float32),
    "dst": (dst, np.float32),
    "circulant": (lambda n, dtype: circulant(np.arange(n), dtype=dtype), np.float32),
    "toeplitz": (lambda n, dtype: toeplitz(np.arange(n), dtype=dtype), np.float32),
}


@pytest.mark.parametrize(("build", "dtype"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_dtype_is_that_asked_for(build, dtype):
    product = build(64, dtype=dtype)
    assert {factor.dtype for factor in product.factors} == {np.dtype(dtype)}
    assert_close(product, build(64, dtype=np.result_type(dtype, np.float64)).toarray())


@pytest.mark.parametrize("n", [4096, 4099])
@pytest.mark.parametrize("name", ["dft", "dct", "dst", "circulant", "toeplitz"])
def test_stored_values_grow_as_n_log_n(name, n):
    build, dtype = TRANSFORMS[name]
    assert build(n, dtype=dtype).nnz <= 40 * n * np.log2(n)


def test_stored_values_of_powers_of_two_are_few():
    n, log_n = 1024, 10
    assert hadamard(n).nnz == dft(n).nnz == 2 * n * log_n
    assert dct(n).nnz <= 8 * n * log_n
    assert circulant(np.ones(n)).nnz <= 16 * n * log_n


def test_products_can_be_applied_and_inverted():
    X = np.random.default_rng(0).standard_normal((360, 3))
    assert np.allclose(dft(360) @ X, np.fft.fft(X, axis=0))
    unitary = dft(360, norm="ortho")
    assert np.allclose(unitary.conj() @ (unitary @ X), X)
    orthogonal = dct(360, norm="ortho")
    assert np.allclose(orthogonal.T @ (orthogonal @ X), X)


def test_products_can_be_saved(tmp_path):
    product = dct(48)
    product.save(tmp_path / "dct.safetensors")
    loaded = FactorProduct.load(tmp_path / "dct.safetensors")
    np.testing.assert_array_equal(loaded.toarray(), product.toarray())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dft(0), "n must be a positive integer"),
        (lambda: dct(2.5), "n must be a positive integer"),
        (lambda: hadamard(12), "n must be a power of two"),
        (lambda: dct(4, 5), "type must be 1, 2, 3 or 4"),
        (lambda: dct(1, 1), "n must be at least 2"),
        (lambda: dst(4, norm="forward"), "norm must be"),
        (lambda: circulant([]), "c must be a vector"),
        (lambda: circulant([[1.0]]), "c must be a vector"),
        (lambda: toeplitz([1.0], ["a"]), "r must be a vector"),
        (lambda: circulant([np.nan, 1.0]), "c must be finite"),
    ],
)
def test_bad_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
