"""Correction of a layer for changed inputs."""

import numpy as np
import pytest
from array_api_strict import asarray

from matfact.calibration import InputStatistics, OutputStatistics
from matfact.solvers.layerwise import corrected


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((200, 6))
    return dense, dense @ (np.eye(6) + 0.2 * rng.standard_normal((6, 6)))


W = np.random.default_rng(1).standard_normal((4, 6))


def test_inputs_as_they_were_change_nothing(inputs):
    dense, _ = inputs
    np.testing.assert_array_equal(corrected(W, OutputStatistics().update(dense, dense @ W.T)), W)


def test_without_damping_it_is_the_least_squares_fit(inputs):
    dense, now = inputs
    found = corrected(W, OutputStatistics().update(now, dense @ W.T), damping=0.0)
    expected = np.linalg.lstsq(now, dense @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_outputs_come_nearer_and_damping_holds_the_weights(inputs):
    dense, now = inputs
    statistics = OutputStatistics().update(now, dense @ W.T)
    found = [corrected(W, statistics, damping=damping) for damping in (0.0, 0.1, 10.0, 1e9)]
    errors = [np.linalg.norm(dense @ W.T - now @ M.T) for M in (*found, W)]
    assert errors == sorted(errors)
    assert errors[1] < 0.5 * errors[-1]
    changes = [np.linalg.norm(M - W) for M in found]
    assert changes == sorted(changes, reverse=True)


@pytest.mark.parametrize(("count", "damping"), [(4, 1.0), (12, 1.0), (48, 0.25), (5000, 0.1)])
def test_the_fewer_samples_the_more_damping(count, damping):
    rng = np.random.default_rng(2)
    dense = rng.standard_normal((count, 6))
    statistics = OutputStatistics().update(
        dense + 0.1 * rng.standard_normal(dense.shape), dense @ W.T
    )
    expected = corrected(W, statistics, damping=damping)
    np.testing.assert_array_equal(corrected(W, statistics), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dead_inputs_leave_their_weights_alone(dtype, inputs):
    dense, now = (x.astype(dtype) for x in inputs)
    now[:, 2] = 0
    found = corrected(W.astype(dtype), OutputStatistics().update(now, dense @ W.T))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[:, 2], W.astype(dtype)[:, 2])
    nothing = OutputStatistics().update(0 * now, dense @ W.T)
    np.testing.assert_array_equal(corrected(W, nothing), W)


def test_any_array_library_will_do(inputs):
    dense, now = inputs
    expected = corrected(W, OutputStatistics().update(now, dense @ W.T))
    statistics = OutputStatistics().update(asarray(now), asarray(dense @ W.T))
    np.testing.assert_allclose(np.asarray(corrected(asarray(W), statistics)), expected, rtol=1e-9)


def test_centered_inputs_have_no_mean_and_constant_ones_no_energy(inputs):
    X = inputs[1] + 3.0
    X[:, 1] = 5.0
    found = InputStatistics().update(X).centered()
    deviations = X - X.mean(axis=0)
    np.testing.assert_allclose(found.gram, deviations.T @ deviations, atol=1e-9)
    np.testing.assert_array_equal(found.gram[:, 1], 0.0)
    np.testing.assert_array_equal(found.mean, 0.0)
    assert found.count == len(X)
