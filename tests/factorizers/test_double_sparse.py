"""What is particular to DoubleSparseFactorizer."""

import numpy as np
import pytest

from matfact import DoubleSparseFactorizer


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_product_of_two_random_sparse_matrices_is_found_again(rng):
    A, B = (
        np.where(rng.random((128, 128)) < 0.05, rng.standard_normal((128, 128)), 0) for _ in "AB"
    )
    model = DoubleSparseFactorizer(density=0.1).fit(A @ B)
    assert model.reconstruction_err_ < 0.2


def test_beats_pruning_by_a_third_on_a_gaussian_matrix(rng):
    model = DoubleSparseFactorizer(density=0.25).fit(rng.standard_normal((96, 96)))
    assert model.normalized_err_ < 0.67


@pytest.mark.parametrize("density", [0.02, 0.05])
def test_is_at_worst_pruning_with_a_diagonal(rng, density):
    W = rng.standard_normal((64, 64))
    model = DoubleSparseFactorizer(density=density, max_iter=20).fit(W)
    budget = int(density * W.size)
    kept = np.sort(np.abs(W), axis=None)[-max(budget - 64, budget // 2) :]
    bound = np.sqrt(1 - (kept**2).sum() / (W**2).sum())
    assert model.reconstruction_err_ <= bound * (1 + 1e-12)


def test_transposing_a_rectangular_matrix_transposes_the_factors(rng):
    W = rng.standard_normal((20, 50))
    wide, tall = (DoubleSparseFactorizer(max_iter=20).fit(A) for A in (W, W.T))
    np.testing.assert_allclose(tall.operator_.toarray(), wide.operator_.toarray().T, rtol=1e-9)
    assert [f.shape for f in tall.factors_] == [(50, 20), (20, 20)]


def test_first_factor_density_sets_the_nonzeros_of_the_first_factor(rng):
    for shape in ((40, 40), (30, 60), (60, 30)):
        W = rng.standard_normal(shape)
        model = DoubleSparseFactorizer(density=0.3, first_factor_density=0.1, max_iter=20).fit(W)
        first, second = model.factors_
        assert first.nnz <= 0.1 * first.shape[0] * first.shape[1]
        assert first.nnz + second.nnz == int(0.3 * W.size)


@pytest.mark.parametrize("first", [1.0, 1e-4])
def test_impossible_first_factor_density_is_refused(rng, first):
    model = DoubleSparseFactorizer(density=0.25, first_factor_density=first)
    with pytest.raises(ValueError, match=r"first_factor_density must give the 20×20 first factor"):
        model.fit(rng.standard_normal((20, 20)))


def test_exactly_sparse_matrix_stops_at_once_without_error(rng):
    W = np.where(rng.random((30, 30)) < 0.05, rng.standard_normal((30, 30)), 0)
    model = DoubleSparseFactorizer(density=0.25).fit(W)
    assert model.reconstruction_err_ < 1e-12
