"""Truncated and whitened SVD."""

import array_api_strict
import numpy as np
import pytest
import torch

from matfact import backend
from matfact.solvers.svd import truncated_svd, whitened_svd

LIBRARIES = [np.asarray, torch.asarray, array_api_strict.asarray]


@pytest.mark.parametrize("asarray", LIBRARIES)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_truncation_error_is_the_energy_of_the_dropped_singular_values(asarray, shape):
    W = np.random.RandomState(0).randn(*shape)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(asarray(W), rank)
        error = np.linalg.norm(W - backend.to_numpy(left @ right)) ** 2
        dropped = np.linalg.svd(W, compute_uv=False)[rank:]
        assert error == pytest.approx((dropped**2).sum(), abs=1e-13)


def test_complex_matrices():
    rng = np.random.RandomState(0)
    W = rng.randn(4, 2) @ rng.randn(2, 5) * (1 + 1j)
    left, right = truncated_svd(W, 4)
    assert left.shape == (4, 2)
    np.testing.assert_allclose(left @ right, W, atol=1e-13)


@pytest.mark.parametrize("asarray", LIBRARIES)
def test_isotropic_inputs_give_the_plain_svd(asarray):
    W = np.random.RandomState(0).randn(5, 7)
    left, right = whitened_svd(asarray(W), 3, asarray(2.0 * np.eye(7)))
    plain = truncated_svd(W, 3)
    np.testing.assert_allclose(backend.to_numpy(left @ right), plain[0] @ plain[1], atol=1e-12)


@pytest.mark.parametrize("n_samples", [0, 1, 3, 50])
def test_weighted_error_is_that_of_the_best_outputs(n_samples):
    rng = np.random.RandomState(n_samples)
    W, X = rng.randn(6, 7), rng.randn(n_samples, 7)
    left, right = whitened_svd(W, 2, X.T @ X)
    outputs = X @ W.T
    dropped = np.linalg.svd(outputs, compute_uv=False)[2:]
    error = np.linalg.norm(outputs - X @ (left @ right).T) ** 2
    assert error == pytest.approx((dropped**2).sum(), abs=1e-11)
    assert left.shape[1] == 2
