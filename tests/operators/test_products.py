"""Factors and their products: every storage against its dense array."""

import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    SelectionFactor,
    SparseFactor,
)

KINDS = ("dense", "csr", "kronecker", "blocks", "selection")


def make_factor(kind, rng, dtype=np.float64, side=12):
    """Return a random factor with `side` columns."""

    def random(*shape):
        values = rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            values = values + 1j * rng.standard_normal(shape)
        return values.astype(dtype)

    if kind == "dense":
        return DenseFactor(random(7, side))
    if kind == "csr":
        dense = np.where(rng.random((9, side)) < 0.3, random(9, side), 0)
        return SparseFactor.from_dense(dense.astype(dtype))
    if kind == "kronecker":  # a=2, d=2, b=5, c=3
        return KroneckerSparseFactor(random(2, 2, 5, side // 4))
    if kind == "blocks":
        corners = [(0, 0), (3, 5), (6, 2)]
        arrays = [random(3, 4), random(2, 7), random(2, 1)]
        return BlockSparseFactor.from_blocks(arrays, corners, (8, side), like=arrays[0])
    index = [3, -1, 0, side - 1, 5]
    return SelectionFactor.from_index(index, side, like=np.zeros(0, dtype))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", KINDS)
def test_locations_say_where_each_value_stands(kind, rng):
    for factor in (make_factor(kind, rng), make_factor(kind, rng).T):
        found = factor.toarray().reshape(-1)[factor.locations]
        np.testing.assert_array_equal(found, factor.values.reshape(-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("kind", KINDS)
def test_apply_transpose_and_conjugate_agree_with_the_dense_array(kind, dtype, rng):
    factor = make_factor(kind, rng, dtype)
    dense = factor.toarray()
    assert dense.shape == factor.shape
    assert dense.dtype == dtype
    X = rng.standard_normal((factor.shape[1], 4)).astype(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12}
    np.testing.assert_allclose(factor.apply(X), dense @ X, **tolerance)
    np.testing.assert_array_equal(factor.T.toarray(), dense.T)
    np.testing.assert_array_equal(factor.conj().toarray(), dense.conj())
    np.testing.assert_array_equal(factor.T.T.toarray(), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_stored_values(kind, rng):
    factor = make_factor(kind, rng)
    assert factor.nnz == np.count_nonzero(factor.toarray()) * (kind != "selection")
    assert factor.flops == 2 * factor.nnz
    assert factor.value_nbytes() == 8 * factor.nnz


def test_bytes_of_a_sparse_factor_are_those_of_its_format(rng):
    factor = make_factor("csr", rng)
    product = FactorProduct([factor])
    rows, columns = factor.shape
    assert product.nbytes("csr") == 8 * factor.nnz + 2 * factor.nnz + 4 * (rows + 1)
    assert product.nbytes("bitmask") == 8 * factor.nnz + -(-rows * columns // 8)
    assert product.nbytes("dense") == 8 * rows * columns
    with pytest.raises(ValueError, match="format must be"):
        product.nbytes("coo")


SHAPES = [(0, 5), (5, 0), (3, 7), (1000, 384), (1000, 383), (9000, 3), (9, 65_536), (9, 70_001)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_bits_say_where_the_values_stand(shape, density, rng):
    mask = rng.random(shape) < density
    values = rng.standard_normal(mask.sum())
    bits = np.packbits(mask)
    factor = SparseFactor.from_bits(values, bits, shape)
    dense = np.zeros(shape)
    dense[mask] = values
    np.testing.assert_array_equal(factor.toarray(), dense)
    np.testing.assert_array_equal(SparseFactor.from_dense(dense).bits, bits)
    with pytest.raises(ValueError, match="values must have as many bits"):
        SparseFactor.from_bits(np.append(values, 1.0), bits, shape)


@pytest.fixture
def product(rng):
    return FactorProduct([DenseFactor(rng.standard_normal((6, 9))), make_factor("csr", rng)])


def test_product_multiplies_vectors_and_matrices_from_both_sides(product, rng):
    dense = product.toarray()
    x, X = rng.standard_normal(12), rng.standard_normal((12, 3))
    y, Y = rng.standard_normal(6), rng.standard_normal((3, 6))
    np.testing.assert_allclose(product @ x, dense @ x)
    np.testing.assert_allclose(product @ X, dense @ X)
    np.testing.assert_allclose(product @ X[:, :0], dense @ X[:, :0])
    np.testing.assert_allclose(y @ product, y @ dense)
    np.testing.assert_allclose(Y @ product, Y @ dense)
    np.testing.assert_allclose(product.T @ y, dense.T @ y)
    assert (product @ list(x)).shape == (6,)


@pytest.mark.parametrize("shape", [(11,), (11, 2), (), (12, 2, 2)])
def test_operand_of_a_wrong_shape_is_refused(product, shape):
    with pytest.raises(ValueError, match=r"X must have shape \(12,\) or \(12, batch\)"):
        product @ np.zeros(shape)


def test_factors_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="at least one factor"):
        FactorProduct([])
    with pytest.raises(ValueError, match="3 columns is followed by one with 4 rows"):
        FactorProduct([DenseFactor(np.ones((2, 3))), DenseFactor(np.ones((4, 2)))])


def test_linear_operator_serves_scipy(product, rng):
    operator = product.to_scipy()
    found = scipy.sparse.linalg.svds(operator, k=2, return_singular_vectors=False)
    expected = np.linalg.svd(product.toarray(), compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(found)[::-1], expected, rtol=1e-8)


@settings(deadline=None, max_examples=25)
@given(
    exponents=st.lists(st.integers(-60, 60), min_size=1, max_size=4),
    scale=st.integers(-100, 100),
)
def test_rescaling_balances_norms_without_rounding(exponents, scale):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, 3)) * 2.0**e for e in exponents]
    product = FactorProduct([DenseFactor(a) for a in arrays])
    balanced = product.rescaled(2.0**scale)
    np.testing.assert_array_equal(balanced.toarray(), product.toarray() * 2.0**scale)
    norms = [np.linalg.norm(f.toarray()) for f in balanced]
    assert max(norms) / min(norms) < 2.0 ** len(norms) + 1


def test_a_zero_factor_is_rescaled_to_zero():
    product = FactorProduct([DenseFactor(np.zeros((2, 2))), DenseFactor(np.ones((2, 2)))])
    np.testing.assert_array_equal(product.rescaled(4.0).toarray(), np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_factors_come_back_as_they_were(kind, dtype, rng, tmp_path):
    product = FactorProduct([make_factor(kind, rng, dtype)])
    product.save(tmp_path / "product.safetensors")
    loaded = FactorProduct.load(tmp_path / "product.safetensors")
    assert loaded.dtype == dtype
    assert [f.kind for f in loaded] == [kind]
    np.testing.assert_array_equal(loaded.toarray(), product.toarray())
    assert [p.name for p in tmp_path.iterdir()] == ["product.safetensors"]


def test_damaged_and_foreign_files_are_refused(product, tmp_path):
    path = tmp_path / "product.safetensors"
    product.save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="path must name"):
            FactorProduct.load(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match="path must name a matfact file"):
        FactorProduct.load(path)
    with pytest.raises(FileNotFoundError):
        FactorProduct.load(tmp_path / "missing.safetensors")


def test_half_precision_is_stored_and_float32_computed(product, rng):
    half = product.astype(np.float16)
    X = rng.standard_normal((12, 3)).astype(np.float16)
    result = half @ X
    assert result.dtype == np.float16
    exact = half.factors[0].toarray().astype(float) @ half.factors[1].toarray() @ X.astype(float)
    np.testing.assert_allclose(result, exact, rtol=2e-3, atol=1e-3)
    assert (half @ X.astype(np.float32)).dtype == np.float32


def test_representation_tells_shapes_density_and_storage(product):
    text = repr(product)
    assert "6×12" in text
    assert "DenseFactor(6×9, 54 values)" in text
    assert "SparseFactor(9×12" in text
