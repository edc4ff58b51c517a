"""Streaming statistics of layer inputs."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from matfact import backend
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.factorizers import LowRank, MagnitudePruner

INTEGERS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.just(3)),
    elements=st.integers(-5, 5).map(float),
)


@settings(deadline=None, max_examples=25)
@given(INTEGERS, st.integers(0, 12))
def test_batches_add_up_to_the_statistics_of_all_inputs(X, cut):
    streamed = InputStatistics().update(X[:cut]).update(X[cut:])
    assert streamed.count == len(X)
    # Small integers: every sum is exact in any order.
    np.testing.assert_array_equal(streamed.gram, X.T @ X)
    np.testing.assert_array_equal(streamed.mean, X.mean(axis=0))
    np.testing.assert_allclose(
        streamed.covariance, np.cov(X.T, bias=True), atol=100 * np.finfo(float).eps
    )


def test_more_rows_than_one_slab():
    X = np.ones((10_000, 2))
    np.testing.assert_array_equal(InputStatistics().update(X).gram, np.full((2, 2), 10_000.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_kept_in_double_precision(dtype):
    X = torch.full((5000, 1), 3.0, dtype=dtype)
    statistics = InputStatistics().update(X)
    assert statistics.gram.dtype == torch.float64
    assert float(statistics.gram[0, 0]) == 45_000.0  # 16-bit sums stop growing at 2048 or less


def test_the_library_of_the_batches_is_kept():
    X = array_api_strict.asarray([[1.0, 2.0]])
    assert backend.namespace(InputStatistics().update(X).second_moment) is array_api_strict


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.ones(3), "batch must have shape"),
        (np.ones((2, 4)), r"batch must have shape \(n_samples, 3\)"),
        (np.array([[1.0, np.nan, 0.0]]), "batch must be finite"),
        (np.array([[1.0, 1e200, 0.0]]), "batch must be finite"),
    ],
)
def test_a_bad_batch_is_refused_and_changes_nothing(batch, message):
    statistics = InputStatistics().update(np.eye(3))
    with pytest.raises(ValueError, match=message):
        statistics.update(batch)
    assert statistics.count == 3
    np.testing.assert_array_equal(statistics.gram, np.eye(3))


def test_layer_error_is_measured_on_the_outputs():
    rng = np.random.RandomState(0)
    W, X = rng.randn(6, 8), rng.randn(20, 8)
    model = LowRank(rank=2).fit(W, calibration=X)
    expected = np.linalg.norm(X @ W.T - model.transform(X)) / np.linalg.norm(X @ W.T)
    assert model.layer_err_ == pytest.approx(expected, rel=1e-10)


def test_layer_error_of_an_earlier_fit_is_forgotten():
    rng = np.random.RandomState(0)
    model = LowRank(rank=1).fit(rng.randn(3, 4), calibration=rng.randn(5, 4))
    assert not hasattr(model.fit(rng.randn(3, 4)), "layer_err_")


@pytest.mark.parametrize(
    ("estimator", "calibration", "message"),
    [
        (LowRank(), np.ones((2, 3)), "calibration must hold inputs with in_features=4"),
        (LowRank(), np.full((2, 4), np.inf), "calibration must be finite"),
        (LowRank(), InputStatistics(), "calibration must hold inputs"),
        (LowRank(), torch.ones((2, 4)), "calibration must have the library"),
        (MagnitudePruner(), np.ones((2, 4)), "calibration must be None: MagnitudePruner"),
    ],
)
def test_bad_calibration_is_refused(estimator, calibration, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(np.ones((3, 4)), calibration=calibration)


@settings(deadline=None, max_examples=25)
@given(INTEGERS, st.integers(0, 12))
def test_batches_of_outputs_add_up(X, cut):
    U = X[:, :2] * 3.0 - 1.0
    streamed = OutputStatistics().update(X[:cut], U[:cut]).update(X[cut:], U[cut:])
    np.testing.assert_array_equal(streamed.inputs.gram, X.T @ X)
    np.testing.assert_array_equal(streamed.cross, X.T @ U)
    np.testing.assert_array_equal(streamed.mean, U.mean(axis=0))
    assert streamed.energy == (U**2).sum()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (np.ones((3, 2)), np.ones((2, 1)), "outputs must have shape"),
        (np.ones((3, 2)), np.ones(3), "outputs must have shape"),
        (np.ones((3, 2)), np.ones((3, 2)), "outputs must have 1 columns"),
        (np.ones((3, 4)), np.ones((3, 1)), "batch must have shape"),
        (np.ones(3), np.ones((3, 1)), "batch must have shape"),
        (np.ones((1, 2)), np.full((1, 1), 1e200), "outputs must be finite"),
    ],
)
def test_bad_outputs_are_refused_and_change_nothing(inputs, outputs, message):
    statistics = OutputStatistics().update(np.eye(2), np.ones((2, 1)))
    with pytest.raises(ValueError, match=message):
        statistics.update(inputs, outputs)
    assert (statistics.inputs.count, statistics.energy) == (2, 2.0)


def test_centered_statistics_are_those_of_the_deviations():
    rng = np.random.RandomState(0)
    X, U = 3 + rng.randn(50, 4), rng.randn(50, 2) - 2
    centered = OutputStatistics().update(X, U).centered()
    expected = OutputStatistics().update(X - X.mean(axis=0), U - U.mean(axis=0))
    np.testing.assert_allclose(centered.inputs.gram, expected.inputs.gram, atol=1e-9)
    np.testing.assert_allclose(centered.cross, expected.cross, atol=1e-9)
    assert centered.energy == pytest.approx(expected.energy)
    assert centered.inputs.count == 50
    np.testing.assert_array_equal(centered.mean, 0.0)


def test_sums_know_what_both_have_seen():
    rng = np.random.default_rng(0)
    X, U = rng.standard_normal((30, 5)), rng.standard_normal((30, 3))
    parts = [OutputStatistics().update(X[rows], U[rows]) for rows in (slice(10), slice(10, 30))]
    whole, found = OutputStatistics().update(X, U), parts[0] + parts[1]
    for a, b in ((found, whole), (found.centered(), whole.centered())):
        np.testing.assert_allclose(a.inputs.gram, b.inputs.gram, atol=1e-12)
        np.testing.assert_allclose(a.cross, b.cross, atol=1e-12)
        np.testing.assert_allclose(a.mean, b.mean, atol=1e-12)
        assert a.inputs.count == b.inputs.count
        assert a.energy == pytest.approx(b.energy)


def test_sums_share_no_memory():
    X = np.random.default_rng(0).standard_normal((10, 4))
    known = InputStatistics().update(X)
    for found in (known + InputStatistics(), InputStatistics() + known):
        found.update(X)
        np.testing.assert_allclose(known.gram, X.T @ X)
        np.testing.assert_allclose(found.gram, 2 * X.T @ X)
