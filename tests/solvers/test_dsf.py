"""Double sparse factorization and the sparse regression under it."""

import numpy as np
import pytest

from matfact import backend, kernels
from matfact.constraints import FixedSupport, GlobalSparsity
from matfact.solvers.admm import SparseState, sparse_regression
from matfact.solvers.dsf import dsf, pruned
from matfact.solvers.least_squares import refit_values


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def _state(values, n_nonzero):
    return SparseState(values, GlobalSparsity(n_nonzero).support(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_normal_equations_of_sparse_and_dense_factors(rng, monkeypatch, dtype, share):
    monkeypatch.setattr("matfact.kernels.products.SMALL", 1)  # all threads, however small
    values, W = (rng.standard_normal(shape).astype(dtype) for shape in ((60, 90), (90, 600)))
    support = rng.random(values.shape) < share
    gram, cross = kernels.normal_equations(values, support, W)
    M = np.where(support, values, 0)
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(gram, M @ M.T, rtol=tolerance, atol=90 * tolerance)
    np.testing.assert_allclose(cross, M @ W, rtol=tolerance, atol=90 * tolerance)
    inner = kernels.supported_inner(values, support, values)
    np.testing.assert_allclose(inner, np.sum(M * M), rtol=tolerance)


def test_regression_on_a_full_support_is_the_ridge_solution(rng):
    M, W = rng.standard_normal((6, 20)), rng.standard_normal((20, 8))
    gram, cross = M @ M.T, M @ W
    everywhere = FixedSupport(np.ones((6, 8)))
    state = _state(np.zeros((6, 8)), 48)
    for _ in range(100):
        state = sparse_regression(gram, cross, state, everywhere, [0.1])
    # With nothing to project, the fixed point carries the damping alone.
    expected = np.linalg.solve(gram + 0.02 * np.diag(np.diag(gram)), cross)
    np.testing.assert_allclose(state.solution, expected, rtol=1e-8)


def test_regression_finds_a_planted_support(rng):
    M = rng.standard_normal((20, 200))
    X = np.where(rng.random((20, 15)) < 0.2, rng.standard_normal((20, 15)), 0.0)
    n_nonzero = np.count_nonzero(X)
    state = _state(np.zeros((20, 15)), n_nonzero)
    for _ in range(30):
        constraint = GlobalSparsity(n_nonzero)
        state = sparse_regression(M @ M.T, M @ M.T @ X, state, constraint, [0.1, 1.0])
    found = state.solution
    assert np.linalg.norm(found - X) < 0.05 * np.linalg.norm(X)


def test_refit_descends_to_the_least_squares_values_of_its_support(rng):
    M, W = rng.standard_normal((8, 30)), rng.standard_normal((30, 5))
    gram, cross = M @ M.T, M @ W
    support = rng.random((8, 5)) < 0.4
    errors = []
    for n_steps in range(0, 41, 4):
        X = refit_values(gram, cross.copy(), np.zeros((8, 5)), support, n_steps)
        assert np.all(X[~support] == 0)
        errors.append(np.linalg.norm(M.T @ X - W))
    assert np.all(np.diff(errors) <= 1e-12)
    for column in range(5):
        rows = support[:, column]
        best = np.linalg.lstsq(M[rows].T, W[:, column])[0]
        np.testing.assert_allclose(X[rows, column], best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40)])
def test_factors_keep_their_budgets_dtype_and_objective(rng, dtype, shape):
    W = rng.standard_normal(shape).astype(dtype)
    seen = []
    left, right, n_iter = dsf(
        W,
        GlobalSparsity(70),
        GlobalSparsity(90),
        max_iter=30,
        callback=lambda i, obj: seen.append((i, obj)),
    )
    assert left.dtype == right.dtype == dtype
    assert np.count_nonzero(left) <= 70
    assert np.count_nonzero(right) <= 90
    assert [i for i, _ in seen] == list(range(1, n_iter + 1))
    # The last refit may only improve on the last objective reported.
    assert np.linalg.norm(W - left @ right) ** 2 <= seen[-1][1] * (1 + 1e-3)


def test_more_sweeps_find_better_supports(rng):
    W = rng.standard_normal((48, 48))
    budget = GlobalSparsity(W.size // 8)

    def error(max_iter):
        left, right, _ = dsf(W, budget, budget, max_iter=max_iter)
        return np.linalg.norm(W - left @ right)

    assert error(100) < error(10)


def test_extreme_scales_of_rows_do_not_overflow(rng):
    W = (rng.standard_normal((20, 1)) @ rng.standard_normal((1, 30))).astype(np.float32)
    W[3] *= 1e-18
    W[5] = 0.0
    with np.errstate(all="raise", under="ignore"):
        left, right, _ = dsf(W, GlobalSparsity(60), GlobalSparsity(60), max_iter=200)
    assert np.all(np.isfinite(left @ right))
    assert np.linalg.norm(W - left @ right) < 0.1 * np.linalg.norm(W)


def test_pruned_keeps_the_largest_entries_within_the_budget(rng):
    W = rng.standard_normal((10, 12))
    for n_values in (2, 7, 40, 100):
        left, right = pruned(W, n_values)
        assert np.count_nonzero(left) + np.count_nonzero(right) <= n_values
        kept = right != 0
        np.testing.assert_array_equal(left @ right, np.where(kept, W, 0))
        assert np.abs(W[kept]).min() >= np.abs(W[~kept]).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solve_of_positive_definite_systems(rng, dtype):
    M = rng.standard_normal((9, 30)).astype(dtype)
    matrix, X = M @ M.T, rng.standard_normal((9, 4)).astype(dtype)
    found = backend.spd_solve(matrix.copy(), matrix @ X)
    np.testing.assert_allclose(found, X, rtol=1e3 * np.finfo(dtype).eps)
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        backend.spd_solve(-matrix, X.copy())
