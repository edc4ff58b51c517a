"""Factorizations that are stored in few bits a weight."""

import math

import numpy as np
import pytest
from sklearn.base import clone

from matfact import (
    GPTQ,
    ADMMPruner,
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    LowRank,
    Quantized,
    RoundToNearest,
)
from matfact.calibration import InputStatistics
from matfact.metrics import DensityTooSmall
from matfact.operators import QuantizedFactor, SignFactor
from tests.conformance.estimators import QUANTIZED


def gaussian(rows=96, columns=128, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


def inputs(columns=128, n=600, seed=1):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns, columns)) * (0.1 + rng.random(columns)) ** 2
    return rng.standard_normal((n, columns)) @ mixed


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_have_the_dtype_of_the_matrix_and_the_product_is_what_it_says(name, dtype):
    W = gaussian().astype(dtype)
    model = clone(QUANTIZED[name]).fit(W)
    dense = model.operator_.toarray()
    assert dense.dtype == model.operator_.dtype == W.dtype
    error = np.linalg.norm(dense.astype(float) - W) / np.linalg.norm(W.astype(float))
    assert model.reconstruction_err_ == pytest.approx(
        error, rel=1e-2 if dtype == "float16" else 1e-5
    )
    x = np.random.default_rng(2).standard_normal((128, 3)).astype(dtype)
    expected = dense.astype(float) @ x
    tolerance = 1e-2 if dtype == "float16" else 1e-4
    np.testing.assert_allclose(model.operator_ @ x, expected, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_fit_repeats_to_the_bit_and_scales_with_the_matrix(name):
    W = gaussian().astype(np.float32)
    first, second, scaled = (clone(QUANTIZED[name]).fit(A) for A in (W, W, 4 * W))
    np.testing.assert_array_equal(first.operator_.toarray(), second.operator_.toarray())
    np.testing.assert_array_equal(4 * first.operator_.toarray(), scaled.operator_.toarray())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (7, 5), (3, 200)])
@pytest.mark.parametrize("kind", ["gaussian", "zero", "one entry", "constant", "rank one"])
def test_odd_shapes_and_degenerate_matrices(name, shape, kind):
    W = gaussian(*shape)
    if kind == "zero":
        W = np.zeros(shape)
    elif kind == "one entry":
        W = np.zeros(shape)
        W[0, -1] = 3.0
    elif kind == "constant":
        W = np.full(shape, 0.7)
    elif kind == "rank one":
        W = np.outer(W[:, 0], W[0])
    model = clone(QUANTIZED[name])
    if isinstance(model, DoubleBinaryFactorizer):
        model.set_params(bits=None)
    error = model.fit(W).reconstruction_err_
    assert math.isfinite(error)
    assert error <= (0.0 if kind == "zero" else 1.0)
    assert np.isfinite(model.operator_.toarray()).all()


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_other_array_libraries_agree_with_numpy(name, library):
    xp = pytest.importorskip(library)
    W = gaussian(40, 24).astype(np.float32)
    model = clone(QUANTIZED[name]).fit(xp.asarray(W))
    dense = model.operator_.toarray()
    assert type(dense) is type(xp.asarray(W))
    ours = clone(QUANTIZED[name]).fit(W)
    assert model.reconstruction_err_ == pytest.approx(ours.reconstruction_err_, rel=0.05)


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_eight_bits_cost_less_than_a_percent(density):
    W = gaussian(192, 256).astype(np.float32)
    model = Quantized(DoubleSparseFactorizer(density, max_iter=30), bits=8).fit(W)
    assert model.reconstruction_err_ <= 1.01 * model.estimator_.reconstruction_err_


def test_error_falls_with_bits_and_levels_are_as_many_as_they_allow():
    W = gaussian(96, 96).astype(np.float32)
    errors = []
    for bits in range(2, 9):
        model = Quantized(DoubleSparseFactorizer(0.4, max_iter=30), bits=bits).fit(W)
        errors.append(model.reconstruction_err_)
        for factor in model.factors_:
            assert isinstance(factor, QuantizedFactor)
            assert len(np.unique(factor.values)) <= 2**bits
            assert factor.values.dtype == np.int8
    assert errors == sorted(errors, reverse=True)


def test_rounding_with_regard_to_the_error_beats_rounding_alone():
    W = gaussian().astype(np.float32)
    model = Quantized(DoubleSparseFactorizer(0.5, max_iter=30), bits=3).fit(W)
    alone = model.estimator_.operator_.quantized(3)
    plain = np.linalg.norm(W - alone.toarray()) / np.linalg.norm(W)
    assert model.reconstruction_err_ < 0.95 * plain


@pytest.mark.parametrize(
    "estimator", [DoubleSparseFactorizer(max_iter=30), ADMMPruner(), LowRank()]
)
def test_calibration_lowers_the_error_of_outputs(estimator):
    W, X = gaussian().astype(np.float32), inputs().astype(np.float32)
    statistics = InputStatistics().update(X)
    model = Quantized(estimator, bits=4)
    blind = clone(model).fit(W).operator_.toarray()
    lost = np.linalg.norm(X @ (W - blind).T) / np.linalg.norm(X @ W.T)
    assert clone(model).fit(W, calibration=statistics).layer_err_ < 0.9 * lost


def test_signs_of_calibrated_double_binary_factors_know_the_inputs():
    W, X = gaussian().astype(np.float32), inputs().astype(np.float32)
    blind = DoubleBinaryFactorizer(max_iter=60).fit(W).operator_.toarray()
    lost = np.linalg.norm(X @ (W - blind).T) / np.linalg.norm(X @ W.T)
    assert DoubleBinaryFactorizer(max_iter=60).fit(W, calibration=X).layer_err_ < 0.8 * lost


@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 3.3])
def test_double_binary_factors_keep_to_the_bits(bits):
    W = gaussian(64, 160).astype(np.float32)
    model = DoubleBinaryFactorizer(bits, max_iter=10).fit(W)
    stored = sum(factor.value_nbytes() for factor in model.factors_)
    assert 0.95 * bits <= 8 * stored / W.size <= bits
    a, S, m, T, b = model.factors_
    assert isinstance(S, SignFactor)
    assert isinstance(T, SignFactor)
    assert [f.shape for f in (a, S, m, T, b)] == [
        (64, 64), (64, S.shape[1]), (S.shape[1],) * 2, (S.shape[1], 160), (160, 160),
    ]  # fmt: skip


def test_more_bits_and_more_sweeps_lower_the_error_of_double_binary_factors():
    W = gaussian(128, 128).astype(np.float32)
    by_bits = [DoubleBinaryFactorizer(b, 30).fit(W).reconstruction_err_ for b in (1, 2, 3)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[1] < 0.4
    assert DoubleBinaryFactorizer(2, 120).fit(W).reconstruction_err_ < by_bits[1]


def test_too_few_bits_are_refused_with_the_least_possible():
    W = gaussian(6, 5)
    with pytest.raises(DensityTooSmall, match=r"bits=0.5 .* 6×5 .* at least \d+") as raised:
        DoubleBinaryFactorizer(0.5).fit(W)
    least = float(str(raised.value).rsplit(" ", 1)[1].rstrip("."))
    assert DoubleBinaryFactorizer(least, max_iter=2).fit(W).operator_[1].shape == (6, 1)


@pytest.mark.parametrize("estimator", [Quantized(), "dsf"])
def test_only_factorizers_can_be_quantized(estimator):
    with pytest.raises(ValueError, match=r"estimator"):
        Quantized(estimator).fit(gaussian())


@pytest.mark.parametrize("estimator", [RoundToNearest(), GPTQ(), DoubleBinaryFactorizer()])
def test_methods_with_bits_of_their_own_are_not_quantized_again(estimator):
    with pytest.raises(ValueError, match="estimator must be a factorizer with floating point"):
        Quantized(estimator, bits=2).fit(gaussian(16, 16))


@pytest.mark.parametrize("model", [Quantized(), RoundToNearest(), GPTQ()])
def test_groups_are_not_larger_than_files_allow(model):
    with pytest.raises(ValueError, match="group_size"):
        model.set_params(group_size=2**70).fit(gaussian(16, 16))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_constant_matrix_is_quantized(bits):
    W = np.full((16, 16), 3.0)
    model = Quantized(DoubleSparseFactorizer(density=0.4), bits=bits).fit(W)
    assert model.reconstruction_err_ < 1e-2


def test_values_whose_scale_is_zero_stay_zero():
    W = gaussian(20, 20) * (np.arange(20) % 2)[:, None]
    model = Quantized(LowRank(), bits=8).fit(W)
    assert any((factor.scales == 0).any() for factor in model.factors_)
    assert model.reconstruction_err_ < 1.02 * model.estimator_.reconstruction_err_
