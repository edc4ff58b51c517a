"""Truncated SVD as an estimator, plain and calibrated."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.factorizers import LowRank


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_the_rank_is_the_largest_that_fits_the_density(rows, columns, density, seed):
    W = np.random.RandomState(seed).randn(rows, columns)
    if density * W.size < rows + columns:
        with pytest.raises(ValueError, match="density"):
            LowRank(density=density).fit(W)
        return
    model = LowRank(density=density).fit(W)
    assert model.nnz_ <= density * W.size < model.nnz_ + rows + columns


def test_rank_is_lowered_to_that_of_the_matrix():
    W = np.outer(np.arange(1.0, 9.0), np.ones(10))
    assert LowRank(rank=5).fit(W).nnz_ == 18


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 5}, "rank must be at most 4"),
        ({"rank": 1, "density": 0.5}, "at most one of rank and density"),
        ({"density": 0.1}, "density=0.1"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**params).fit(np.ones((4, 6)))


def test_no_product_of_the_rank_has_a_smaller_layer_error():
    rng = np.random.RandomState(0)
    W = rng.randn(4, 5)
    X = rng.randn(30, 5) * np.array([3.0, 1.0, 0.3, 0.1, 2.0])
    model = LowRank(rank=2).fit(W, calibration=X)
    target = X @ W.T

    def error(flat):
        left, right = flat[:8].reshape(4, 2), flat[8:].reshape(2, 5)
        return np.linalg.norm(target - X @ (left @ right).T) / np.linalg.norm(target)

    searched = min(scipy.optimize.minimize(error, rng.randn(18)).fun for _ in range(5))
    assert model.layer_err_ == pytest.approx(searched, rel=1e-4)


def test_calibration_lowers_the_layer_error_of_the_plain_svd():
    rng = np.random.RandomState(0)
    W, X = rng.randn(12, 16), rng.randn(40, 16) * np.linspace(0.01, 3, 16)
    plain = LowRank(rank=3).fit(W).transform(X)
    plain_error = np.linalg.norm(X @ W.T - plain) / np.linalg.norm(X @ W.T)
    assert LowRank(rank=3).fit(W, calibration=X).layer_err_ < 0.9 * plain_error


def test_inputs_that_span_little_leave_rank_for_the_rest():
    rng = np.random.RandomState(0)
    W = rng.randn(6, 6)
    x = rng.randn(1, 6)
    model = LowRank(rank=3).fit(W, calibration=x)
    assert model.layer_err_ < 10 * np.sqrt(np.finfo(float).eps)  # from a Gram: squares
    # What is left of the rank is no worse spent than a rank-two SVD of the rest would be.
    assert model.reconstruction_err_ <= LowRank(rank=2).fit(W).reconstruction_err_ + 1e-12
