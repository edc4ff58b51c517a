"""Products of quantized values and signs are applied from their codes, as if these were floats."""

import numpy as np
import pytest

from matfact.operators import (
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    QuantizedFactor,
    SelectionFactor,
    SignFactor,
    SparseFactor,
)
from matfact.operators._quantized import group_bounds


def quantized(pattern, rng, bits=8, group_size=64, dtype=np.float32):
    """Return a factor of random levels of so many bits, zeros among them."""
    top = 2 ** (bits - 1) - 1
    levels = rng.integers(-top - (bits < 8), top + 1, pattern.values.shape).astype(np.int8)
    scales = rng.uniform(0.5, 2, len(group_bounds(pattern, group_size)) - 1).astype(dtype)
    return QuantizedFactor(levels, scales, bits, group_size, pattern)


def sparse(rows, columns, density, rng, **options):
    return quantized(SparseFactor.from_dense(rng.random((rows, columns)) < density), rng, **options)


def dense(rows, columns, rng, **options):
    return quantized(DenseFactor(np.zeros((rows, columns))), rng, **options)


def diagonal(n, rng, dtype=np.float32):
    return KroneckerSparseFactor(rng.standard_normal((1, n, 1, 1)).astype(dtype))


def signs(rows, columns, rng, dtype=np.float32):
    return SignFactor.from_dense(rng.standard_normal((rows, columns)).astype(dtype))


def ragged(rng, **options):
    """Return a factor of rows of many lengths, empty ones among them."""
    lengths = np.concatenate([[0, 300, 299, 1], rng.integers(90, 140, 100), [0] * 9])
    mask = np.arange(300) < lengths[:, None]
    return quantized(SparseFactor.from_dense(rng.permuted(mask, axis=1)), rng, **options)


PRODUCTS = {
    "sparse": lambda rng, t: [
        sparse(150, 230, 0.3, rng, dtype=t), sparse(230, 190, 0.4, rng, dtype=t),
    ],
    "4 bits": lambda rng, t: [sparse(150, 230, 0.3, rng, bits=4, group_size=16, dtype=t)],
    "2 bits": lambda rng, t: [sparse(150, 230, 0.3, rng, bits=2, dtype=t)],
    "a scale for two": lambda rng, t: [dense(150, 165, rng, group_size=2, dtype=t)],
    "a scale for each row": lambda rng, t: [sparse(150, 160, 0.5, rng, group_size=None, dtype=t)],
    "ragged": lambda rng, t: [ragged(rng, dtype=t)],
    "ragged, 3 bits": lambda rng, t: [ragged(rng, bits=3, group_size=30, dtype=t)],
    "dense": lambda rng, t: [dense(149, 215, rng, dtype=t), dense(215, 130, rng, bits=4, dtype=t)],
    "tall": lambda rng, t: [dense(400, 3, rng, dtype=t)],
    "double binary": lambda rng, t: [
        diagonal(149, rng, t), signs(149, 203, rng, t), diagonal(203, rng, t),
        signs(203, 167, rng, t), diagonal(167, rng, t),
    ],
    "one row of signs": lambda rng, t: [signs(1, 300, rng, t)],
    "one column of signs": lambda rng, t: [signs(300, 1, rng, t)],
    "mixed codes": lambda rng, t: [
        quantized(diagonal(150, rng, t), rng, dtype=t), sparse(150, 140, 0.3, rng, dtype=t),
        SelectionFactor.from_index([*range(139), -1], 160, like=np.zeros(0, t)),
        signs(160, 135, rng, t), dense(135, 60, rng, dtype=t),
    ],
}  # fmt: skip


def exact(factors, X, magnitude=False):
    """Return the product in double precision, or that of all magnitudes."""
    for factor in reversed(factors):
        matrix = factor.decoded().toarray().astype(np.float64)
        X = (np.abs(matrix) if magnitude else matrix) @ X
    return X


def error(found, factors, X):
    """Return the largest error in units of what rounding explains."""
    unit = np.finfo(found.dtype).eps * len(factors) * 20
    bound = exact(factors, np.abs(X).astype(np.float64), magnitude=True)
    wide = X.astype(np.complex128 if np.iscomplexobj(X) else np.float64)
    return np.max(
        np.abs(found - exact(factors, wide)) / (unit * bound + np.finfo(found.dtype).tiny)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_codes_are_applied_as_floats_would_be(name, dtype):
    rng = np.random.default_rng(0)
    product = FactorProduct(PRODUCTS[name](rng, dtype))
    program = product._plan._program(np.dtype(dtype))
    assert program.stored == "int8"
    for batch in (1, 2, 15, 16, 17, 40, 64, 65, 300):
        X = rng.standard_normal((product.shape[1], batch)).astype(dtype)
        found = program.apply(X, 1)
        assert error(found, product.factors, X) < 1
        for threads in (2, 3):
            np.testing.assert_array_equal(program.apply(X, threads), found)
        np.testing.assert_array_equal(program.apply(np.asfortranarray(X), 1), found)


@pytest.mark.parametrize("name", ["sparse", "ragged", "dense", "double binary"])
def test_transposes_and_complex_operands_are_taken(name):
    rng = np.random.default_rng(1)
    product = FactorProduct(PRODUCTS[name](rng, np.float32))
    for operator in (product, product.T):
        X = rng.standard_normal((operator.shape[1], 5)).astype(np.float32)
        assert error(operator @ X, operator.factors, X) < 1
        X = X + 1j * X[::-1]
        for operand in (X, X[:, 0].copy()):
            found = operator @ operand
            assert found.dtype == np.complex64
            assert found.shape == (operator.shape[0], *operand.shape[1:])
            columns = (-1, X.shape[1] if operand.ndim == 2 else 1)
            assert error(found.reshape(columns), operator.factors, operand.reshape(columns)) < 1


@pytest.mark.parametrize("batch", [1, 20, 70])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 3e38, 1e-40])
@pytest.mark.parametrize("name", ["sparse", "ragged", "ragged, 3 bits", "dense", "double binary"])
def test_numbers_beyond_the_usual_go_where_they_go_with_floats(name, number, batch):
    rng = np.random.default_rng(2)
    (factor,) = PRODUCTS[name](rng, np.float32)[:2][-1:]
    if isinstance(factor, QuantizedFactor):
        scales = factor.scales / 300  # so that no product of a value overflows
        levels = np.where(factor.values == 0, np.int8(1), factor.values)
        factor = QuantizedFactor(levels, scales, factor.bits, factor.group_size, factor.pattern)
    X = rng.standard_normal((factor.shape[1], batch)).astype(np.float32)
    X[-1] = number
    coded, plain = FactorProduct([factor]), FactorProduct([factor.decoded()])
    if isinstance(factor, SignFactor):
        plain = FactorProduct([DenseFactor(factor.toarray())])
    found = coded._plan._program(X.dtype).apply(X)
    expected = plain._plan._program(X.dtype).apply(X)
    if np.isfinite(number):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    else:
        is_reached = ~np.isfinite(expected)
        np.testing.assert_array_equal(found[is_reached], expected[is_reached])
        assert np.isfinite(found[~is_reached]).all()
        assert is_reached.any()


def test_codes_take_less_memory_than_floats():
    rng = np.random.default_rng(3)
    for factor, most in (
        (sparse(400, 400, 0.25, rng), 0.65),
        (dense(400, 400, rng), 0.3),
        (signs(512, 512, rng), 0.04),
    ):
        plain = DenseFactor(factor.toarray()) if factor.kind == "sign" else factor.decoded()
        sizes = []
        for f in (factor, plain):
            program = FactorProduct([f])._plan._program(np.dtype(np.float32))
            sizes.append(program._arrays[1].nbytes + program._arrays[2].nbytes)
        assert sizes[0] < most * sizes[1]


def test_products_with_floats_and_rows_without_equals_are_applied_as_floats():
    rng = np.random.default_rng(4)
    lonely = rng.random((60, 9000)) < 70 * np.arange(60)[:, None] / 9000
    lonely = quantized(SparseFactor.from_dense(lonely), rng)
    few, narrow = dense(4, 300, rng), dense(300, 1, rng)
    blocks = quantized(KroneckerSparseFactor(np.zeros((10, 1, 20, 20))), rng)
    each = [sparse(150, 160, 0.2, rng, group_size=1), dense(160, 170, rng, group_size=1)]
    with_floats = [sparse(200, 150, 0.3, rng), DenseFactor(rng.standard_normal((150, 160)))]
    for factors in (
        [lonely],
        [few],
        [narrow],
        [blocks],
        each,
        with_floats,
        [signs(150, 200, rng), blocks],
    ):
        product = FactorProduct(factors)
        assert product._plan._program(np.dtype(np.float64)).stored == ""
        X = rng.standard_normal((product.shape[1], 3))
        assert error(product @ X, factors, X) < 1


@pytest.mark.parametrize("name", ["sparse", "dense", "double binary"])
def test_small_products_are_applied_without_the_compiler(name):
    rng = np.random.default_rng(5)
    factors = {
        "sparse": [sparse(60, 50, 0.3, rng), sparse(50, 70, 0.3, rng)],
        "dense": [dense(60, 2, rng), dense(2, 70, rng)],
        "double binary": [diagonal(60, rng), signs(60, 3, rng), signs(3, 70, rng)],
    }[name]
    for batch in (1, 9, 9000):
        X = rng.standard_normal((70, batch)).astype(np.float32)
        assert error(FactorProduct(factors) @ X, factors, X) < 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["sparse", "double binary"])
def test_tensors_of_codes_use_the_kernels_and_are_prepared_anew_when_written_to(name, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    factors = PRODUCTS[name](rng, np.float32)

    def tensor(array):
        return torch.from_numpy(array).to(getattr(torch, dtype))

    tensors = [
        QuantizedFactor(
            torch.from_numpy(f.values), tensor(f.scales), f.bits, f.group_size,
            f.pattern.with_values(tensor(np.zeros(f.nnz))),
        )
        if f.kind == "quantized" else f.with_values(tensor(f.values))
        for f in factors
    ]  # fmt: skip
    product = FactorProduct(tensors)
    rounded = FactorProduct([f.astype(torch.float32) for f in tensors])
    X = rng.standard_normal((product.shape[1], 20)).astype(np.float32)
    found = product @ torch.from_numpy(X)
    assert product._plan._program(np.dtype(np.float32)).stored == "int8"
    wide = [np.asarray(f.decoded().toarray()) for f in rounded]
    assert error(found.numpy(), [DenseFactor(f) for f in wide], X) < 1
    assert (product @ torch.from_numpy(X).to(tensors[0].dtype)).dtype == tensors[0].dtype
    first = tensors[0].scales if name == "sparse" else tensors[0].values
    first.mul_(2)
    torch.testing.assert_close(product @ torch.from_numpy(X), 2 * found)


@pytest.mark.parametrize("name", ["sparse", "dense", "double binary"])
def test_advice_and_tuning_know_products_of_codes(name):
    product = FactorProduct(PRODUCTS[name](np.random.default_rng(7), np.float32))
    assert {product.method_for(batch) for batch in (1, 256)} <= {"factors", "dense"}
    advice = product.advise(16)
    assert min(advice.factors_seconds, advice.dense_seconds) > 0
    tuned = product.tune(16)
    assert product.method_for(16) == tuned.method
    X = np.ones((product.shape[1], 16), np.float32)
    np.testing.assert_array_equal(product @ X, product @ X.copy())


def test_the_rule_prefers_codes_where_memory_is_the_limit():
    rng = np.random.default_rng(8)
    for factors in ([dense(512, 512, rng)], [signs(512, 512, rng), signs(512, 512, rng)]):
        product = FactorProduct(factors)
        assert product.method_for(1) == product.method_for(16) == "factors"
    assert FactorProduct([sparse(512, 512, 0.9, rng)] * 2).method_for(256) == "dense"
