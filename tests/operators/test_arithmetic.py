"""Products of factors behave like arrays in NumPy and SciPy."""

import operator

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as sla

from matfact.operators import (
    DenseFactor,
    FactorProduct,
    SelectionFactor,
    SignFactor,
    SparseFactor,
)
from matfact.transforms import dft, hadamard

RNG = np.random.default_rng(0)


def make_product(dtype=np.float64, rows=7, columns=9):
    left, right = RNG.standard_normal((rows, 5)), RNG.standard_normal((5, columns))
    if np.dtype(dtype).kind == "c":
        left = left + 1j * RNG.standard_normal(left.shape)
    return FactorProduct(
        [DenseFactor(left.astype(dtype)), SparseFactor.from_dense(right.astype(dtype))]
    )


@pytest.fixture(params=[np.float64, np.complex128])
def product(request):
    return make_product(request.param)


def test_numpy_takes_it_for_the_dense_matrix(product):
    np.testing.assert_array_equal(np.asarray(product), product.toarray())
    assert np.asarray(product, np.complex64).dtype == np.complex64
    assert product.ndim == np.ndim(product) == 2
    assert np.shape(product) == (7, 9)
    with pytest.raises(ValueError, match="copy must not be False"):
        np.asarray(product, copy=False)


def test_products_chain_in_the_dtype_of_both():
    chained = hadamard(8) @ dft(8)
    assert len(chained) == len(hadamard(8)) + len(dft(8))
    assert chained.dtype == np.complex128
    np.testing.assert_allclose(
        chained.toarray(), hadamard(8).toarray() @ dft(8).toarray(), atol=1e-12
    )
    np.testing.assert_allclose(chained @ np.ones(8), chained.toarray() @ np.ones(8), atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(8, 8\) is followed by one of shape \(4, 4\)"):
        hadamard(8) @ hadamard(4)


def test_factors_of_several_dtypes_lose_nothing():
    mixed = FactorProduct([*hadamard(8), *dft(8)])
    assert mixed.dtype == np.complex128
    np.testing.assert_allclose(
        mixed.toarray(), hadamard(8).toarray() @ dft(8).toarray(), atol=1e-12
    )


@pytest.mark.parametrize("scalar", [2, 0.5, 1 - 2j, np.float64(3), np.float32(3), np.array(2.0)])
def test_numbers_scale_from_both_sides(product, scalar):
    dense = product.toarray()
    for found, expected in (
        (scalar * product, scalar * dense),
        (product * scalar, scalar * dense),
        (product / scalar, dense / scalar),
    ):
        assert isinstance(found, FactorProduct)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.toarray(), expected)
    np.testing.assert_array_equal((-product).toarray(), -dense)


def test_a_number_keeps_the_dtype_as_numpy_does():
    single = make_product(np.float32)
    assert (2 * single).dtype == (2 * single.toarray()).dtype == np.float32
    assert (np.float64(2) * single).dtype == np.float64


def test_permutations_can_be_scaled():
    swap = FactorProduct([SelectionFactor.from_index([1, 0, -1], 2, like=np.zeros(0))])
    np.testing.assert_array_equal((3 * swap).toarray(), 3 * swap.toarray())


@pytest.mark.parametrize("other", [np.ones((7, 9)), [1.0, 2.0], "2", None, make_product()])
@pytest.mark.parametrize("operation", [operator.mul, operator.truediv])
def test_only_numbers_scale(product, other, operation):
    with pytest.raises(TypeError, match=r"only be multiplied or divided by a number, got .*use @"):
        operation(product, other)
    if operation is operator.mul:
        with pytest.raises(TypeError, match="only be multiplied or divided by a number, got"):
            other * product


def test_arrays_lists_and_sparse_matrices_are_multiplied_from_both_sides(product):
    dense = product.toarray()
    X, Y = RNG.standard_normal((9, 3)), RNG.standard_normal((3, 7)) + 1j
    S, T = scipy.sparse.random_array((9, 4), density=0.5), scipy.sparse.csr_matrix(Y)
    np.testing.assert_allclose(product @ X, dense @ X)
    np.testing.assert_allclose(Y @ product, Y @ dense)
    np.testing.assert_allclose(Y[0] @ product, Y[0] @ dense)
    np.testing.assert_allclose(Y.tolist() @ product, Y @ dense)
    np.testing.assert_allclose(product @ S, dense @ S.toarray())
    np.testing.assert_allclose(T @ product, Y @ dense)


@pytest.mark.parametrize("operation", [operator.add, operator.sub])
@pytest.mark.parametrize(
    "make",
    [lambda: make_product(), lambda: scipy.sparse.eye_array(7, 9),
     lambda: sla.aslinearoperator(np.ones((7, 9))), lambda: np.ones((7, 9))],
    ids=["product", "sparse", "operator", "array"],
)  # fmt: skip
def test_sums_and_differences_are_operators_or_arrays(product, make, operation):
    other, X = make(), RNG.standard_normal((9, 3))
    for left, right in ((product, other), (other, product)):
        found = operation(left, right)
        expected = operation(left @ np.eye(9), right @ np.eye(9))
        assert isinstance(
            found, np.ndarray if isinstance(other, np.ndarray) else sla.LinearOperator
        )
        np.testing.assert_allclose(found @ X, expected @ X)


@pytest.mark.parametrize("other", [np.ones((9, 7)), np.ones(9), 1.0, [[1.0] * 9] * 6])
def test_sums_need_the_same_shape(product, other):
    with pytest.raises(ValueError, match=r"of shape \(7, 9\) can only be added to a matrix"):
        product + other
    with pytest.raises(ValueError, match=r"of shape \(7, 9\) can only be added to a matrix"):
        other - product


def test_operators_of_scipy_compose_with_products(product):
    A = sla.aslinearoperator(np.ones((9, 4)))
    np.testing.assert_allclose((product @ A) @ np.eye(4), product.toarray() @ np.ones((9, 4)))


def test_solvers_of_scipy_take_products_as_they_are(product):
    dense = product.toarray()
    found = sla.svds(product, k=2, return_singular_vectors=False, rng=0)
    expected = np.linalg.svd(dense, compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(found)[::-1], expected, rtol=1e-8)
    operator_ = sla.aslinearoperator(product)
    assert (operator_.shape, operator_.dtype) == (product.shape, product.dtype)
    Y = RNG.standard_normal((7, 2))
    np.testing.assert_allclose(operator_.H @ Y, dense.conj().T @ Y)
    np.testing.assert_allclose(operator_.rmatvec(Y[:, :1]), dense.conj().T @ Y[:, :1])
    np.testing.assert_allclose(product.H.toarray(), dense.conj().T)
    x = sla.lsqr(product, Y[:, 0], atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(x, np.linalg.lstsq(dense, Y[:, 0])[0], atol=1e-6)


def test_conjugate_gradients_solve_with_a_product():
    A = hadamard(16)
    square = 2 * (A @ A.H)
    b = RNG.standard_normal(16)
    x, info = sla.cg(square, b)
    assert info == 0
    np.testing.assert_allclose(square.toarray() @ x, b, atol=1e-4)


def test_tensors_are_multiplied_scaled_and_chained():
    torch = pytest.importorskip("torch")
    numpy_product = make_product()
    product = FactorProduct([f.with_values(torch.tensor(f.values)) for f in numpy_product])
    dense = product.toarray()
    Y = torch.ones(3, 7, dtype=torch.float64)
    torch.testing.assert_close(Y @ product, Y @ dense)
    np.testing.assert_allclose(np.asarray(product), numpy_product.toarray())
    scalar = torch.tensor(2.0, requires_grad=True)
    for scaled in (scalar * product, np.float64(2) * product, product * 2):
        torch.testing.assert_close(scaled.toarray().detach(), 2 * dense)
    (scalar * product).toarray().sum().backward()
    torch.testing.assert_close(scalar.grad.double(), dense.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((product.H @ product).toarray(), dense.T @ dense)
    torch.testing.assert_close(product + dense, 2 * dense)
    with pytest.raises(TypeError, match="products must have the same array library"):
        product @ numpy_product.T
    with pytest.raises(TypeError, match="needs a product of NumPy factors"):
        product + product


@pytest.mark.parametrize("c", [3.0, -1, 0, np.float32(0.3), 2 - 1j])
def test_coded_values_are_scaled_by_their_scales(c, tmp_path):
    quantized = make_product().quantized(4)
    for product in (quantized, FactorProduct([SignFactor.from_dense(np.eye(7)), *quantized])):
        dense = product.toarray()
        for scaled, expected in ((c * product, c * dense), (product.conj() * c, c * dense)):
            np.testing.assert_allclose(scaled.toarray(), expected, atol=1e-12)
            np.testing.assert_allclose(scaled @ np.ones(9), expected @ np.ones(9), atol=1e-12)
            np.testing.assert_allclose(scaled.H.toarray(), expected.conj().T, atol=1e-12)
        np.testing.assert_array_equal((-product).toarray(), -dense)
        np.testing.assert_allclose((product / 3).toarray(), dense / 3, atol=1e-12)
        (c * product).save(tmp_path / "scaled")
        loaded = FactorProduct.load(tmp_path / "scaled")
        np.testing.assert_array_equal(loaded.toarray(), (c * product).toarray())


def test_signs_alone_are_scaled():
    signs = SignFactor.from_dense(RNG.standard_normal((4, 6)))
    product = 3 * FactorProduct([signs])
    np.testing.assert_array_equal(product.toarray(), 3 * signs.toarray())
