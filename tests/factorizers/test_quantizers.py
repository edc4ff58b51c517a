"""Rounding to nearest and GPTQ: what is lost, and what is made up for."""

import array_api_strict
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV

from matfact import GPTQ, RoundToNearest, backend, metrics
from matfact.calibration import InputStatistics
from matfact.operators import FactorProduct
from matfact.solvers.error_feedback import feedback, sweep

QUANTIZERS = [RoundToNearest, GPTQ]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def W(rng):
    return rng.standard_normal((24, 128))


def inputs(rng, samples, features):
    return rng.standard_normal((samples, features)) @ (
        np.eye(features) + 0.2 * rng.standard_normal((features, features))
    )


def min_max_rounded(W, bits, group_size):
    """Rounding as most publications do it, with NumPy alone."""
    groups = W.reshape(len(W), -1, group_size)
    scales = 2 * np.abs(groups).max(2, keepdims=True) / (2**bits - 1)
    half = 2 ** (bits - 1)
    return (np.clip(np.round(groups / scales), -half, half - 1) * scales).reshape(W.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_even_levels_between_the_extremes_are_those_of_publications(bits, W):
    model = RoundToNearest(bits, 64, "min_max").fit(W)
    expected = min_max_rounded(W, bits, 64)
    # Scales have 16 bits, so that a value halfway between levels may go to the other one.
    lost = np.linalg.norm(W - expected) / np.linalg.norm(W)
    assert model.reconstruction_err_ == pytest.approx(lost, rel=2e-3)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.85), (4, 0.9), (5, 0.9)])
def test_fitted_levels_lose_less(bits, share, W):
    even, fitted = (RoundToNearest(bits, grid=g).fit(W) for g in ("min_max", "fitted"))
    assert fitted.reconstruction_err_ < share * even.reconstruction_err_
    assert fitted.operator_.nbytes() <= even.operator_.nbytes() + 2**bits


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("columns", [1, 5, 50, 128])
@pytest.mark.parametrize("group_size", [None, 1, 16, 64, 1000])
def test_levels_are_few_and_scales_shared(quantizer, columns, group_size, rng):
    W = rng.standard_normal((6, columns))
    model = quantizer(3, group_size).fit(W, calibration=inputs(rng, 200, columns))
    factor = model.factors_[0]
    assert len(np.unique(factor.values)) <= 8
    groups = 1 if group_size is None else max(1, round(columns / group_size))
    assert len(factor.scales) == 6 * groups
    unit = np.abs(factor.scales).max() / 2**14
    narrow = (factor.scales / 2.0 ** np.floor(np.log2(unit))).astype(np.float16)
    np.testing.assert_array_equal(narrow * 2.0 ** np.floor(np.log2(unit)), factor.scales)


@pytest.mark.parametrize("grid", ["fitted", "min_max"])
def test_without_calibration_gptq_rounds_to_nearest(grid, W):
    nearest, gptq = (q(grid=grid).fit(W).operator_.toarray() for q in QUANTIZERS)
    np.testing.assert_array_equal(gptq, nearest)


@pytest.mark.parametrize("act_order", [False, True, "auto"])
@pytest.mark.parametrize("grid", ["fitted", "min_max"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_lowers_the_error_of_outputs(bits, grid, act_order, W, rng):
    X = inputs(rng, 1000, 128)
    gram = InputStatistics().update(X).gram
    nearest = RoundToNearest(bits, grid=grid).fit(W).operator_.toarray()
    model = GPTQ(bits, act_order=act_order, grid=grid).fit(W, calibration=X)
    assert model.layer_err_ < 0.8 * metrics.layer_error(W, nearest, gram)


def test_auto_is_the_better_order(W, rng):
    X = inputs(rng, 1000, 128) * rng.uniform(0.1, 3, 128)
    plain, ordered, auto = (
        GPTQ(3, act_order=a).fit(W, calibration=X).history_["objective"][0]
        for a in (False, True, "auto")
    )
    assert plain != ordered
    assert auto == min(plain, ordered)


def test_rounding_counts_errors_by_the_size_of_inputs(W, rng):
    X = rng.standard_normal((500, 128)) * np.where(np.arange(128) % 4, 0.05, 1.0)
    gram = InputStatistics().update(X).gram
    blind = RoundToNearest(2).fit(W).operator_.toarray()
    model = RoundToNearest(2).fit(W, calibration=X)
    assert model.layer_err_ < 0.9 * metrics.layer_error(W, blind, gram)


def test_feedback_decomposes_the_gram_matrix(rng):
    X = inputs(rng, 100, 16)
    gram = X.T @ X
    found = feedback(gram, 0.1)
    lower = np.eye(16) + found.coefficients
    damped = gram / np.trace(gram) * 16 + 0.1 * np.eye(16)
    np.testing.assert_allclose(lower * found.weights @ lower.T, damped, atol=1e-12)
    assert not np.tril(found.coefficients).any()


@pytest.mark.parametrize("bounds", [[0, 13], [0, 4, 8, 13], list(range(14))], ids=str)
def test_sweep_is_that_of_an_inverse_updated_column_by_column(bounds, rng):
    W, X = rng.standard_normal((7, 13)), inputs(rng, 60, 13)
    found = feedback(X.T @ X, 0.01)
    seen = {}

    def begin(panel, targets):
        seen[panel.start] = targets.copy()
        return lambda place, target: np.round(target)

    result, objective = sweep(W.T.copy(), found, bounds, begin)
    # The published form: what is lost is spread by rows of the Cholesky factor of the inverse.
    lower = np.eye(13) + found.coefficients
    damped = lower * found.weights @ lower.T
    spread = np.linalg.cholesky(np.linalg.inv(damped)).T
    T = W.T.copy()
    for j in range(13):
        if j in bounds:
            stop = bounds[bounds.index(j) + 1]
            np.testing.assert_allclose(seen[j], T[j:stop], atol=1e-10)
        rounded = np.round(T[j])
        T[j + 1 :] -= np.outer(spread[j, j + 1 :], (T[j] - rounded) / spread[j, j])
        T[j] = rounded
    np.testing.assert_array_equal(result, T)
    lost = W - result.T
    assert objective == pytest.approx(np.sum(lost @ damped * lost))


def odd_inputs(rng):
    dead = inputs(rng, 300, 32)
    dead[:, [0, 5, 31]] = 0
    yield "dead", dead
    yield "few", inputs(rng, 3, 32)
    yield "zero", np.zeros((4, 32))
    yield "alike", np.repeat(rng.standard_normal((200, 1)), 32, axis=1)
    yield "uneven", inputs(rng, 300, 32) * 10.0 ** rng.integers(-8, 8, 32)


@pytest.mark.parametrize("damping", [0, 1e-12, 0.01])
@pytest.mark.parametrize("act_order", [False, True])
def test_odd_inputs_are_damped_as_need_be(damping, act_order, rng):
    W = rng.standard_normal((8, 32))
    for name, X in odd_inputs(rng):
        model = GPTQ(4, 16, damping, act_order).fit(W, calibration=X)
        assert np.isfinite(model.operator_.toarray()).all(), name
        assert model.layer_err_ < 0.2, name


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_array_libraries_agree(library, dtype, W, rng):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip("torch")
    W, X = W.astype(dtype), inputs(rng, 500, 128).astype(dtype)
    expected = GPTQ(3).fit(W, calibration=X)
    model = GPTQ(3).fit(xp.asarray(W), calibration=xp.asarray(X))
    assert type(model.factors_[0].values) is type(xp.asarray(W))
    assert model.layer_err_ == pytest.approx(expected.layer_err_, rel=0.01)
    assert backend.to_numpy(model.operator_.toarray()).shape == W.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_is_saved_is_what_was_fitted(quantizer, W, rng, tmp_path):
    W[3] = 0  # a row whose scales are zero
    model = quantizer(2).fit(W, calibration=inputs(rng, 500, 128))
    assert (model.factors_[0].scales < 0).any()
    model.operator_.save(tmp_path / "W.safetensors")
    loaded = FactorProduct.load(tmp_path / "W.safetensors")
    np.testing.assert_array_equal(loaded.toarray(), model.operator_.toarray())
    assert not loaded.toarray()[3].any()


@pytest.mark.parametrize(
    "parameters", [{"bits": 1}, {"bits": 9}, {"bits": 3.5}, {"group_size": 0}, {"grid": "even"}]
)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_bad_parameters_are_named(quantizer, parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        quantizer(**parameters).fit(np.ones((4, 6)))


@pytest.mark.parametrize("estimator", [RoundToNearest(), GPTQ()])
def test_grid_search_finds_the_most_bits(estimator):
    W = np.random.default_rng(0).standard_normal((30, 64))
    search = GridSearchCV(estimator, {"bits": [2, 3, 5]}, cv=3).fit(W)
    scores = search.cv_results_["mean_test_score"]
    assert (np.diff(scores) > 0.05).all()
    assert search.best_params_ == {"bits": 5}
