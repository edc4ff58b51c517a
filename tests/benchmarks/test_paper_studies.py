"""What the papers' experiments compute besides fitting: bounds, budgets and starts."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# The benchmarks are not installed with the library.
from benchmarks.published_dsf import published_dsf  # noqa: E402
from benchmarks.studies import low_rank, neuron_selection, projection, sparse_inference  # noqa: E402
from matfact.calibration import OutputStatistics  # noqa: E402


def test_least_errors_are_those_of_the_best_supports():
    rng = np.random.RandomState(0)
    H = np.maximum(rng.randn(80, 7), 0)
    U = H @ rng.randn(7, 3) + rng.randn(3)
    H[:, 4] = H[:, 2]  # a pair that is no more than one unit
    found = neuron_selection.least_errors(OutputStatistics().update(H, U))
    for size in (1, 2):
        errors = []
        for support in itertools.combinations(range(7), size):
            A = np.column_stack([H[:, support], np.ones(len(H))])
            errors.append(np.linalg.norm(U - A @ np.linalg.lstsq(A, U)[0]) / np.linalg.norm(U))
        assert found[str(size)] == pytest.approx(min(errors), abs=1e-9)


@pytest.mark.parametrize("with_root", [False, True])
def test_alds_meets_the_budget_or_says_that_it_cannot(with_root):
    rng = np.random.RandomState(0)
    W = {"a": rng.randn(12, 16).astype("f"), "b": rng.randn(4, 12).astype("f")}
    choose = low_rank.alds(W, {"a": 16, "b": 12}, with_root)
    assert choose(40) is None
    weights = choose(150)
    assert all(np.linalg.matrix_rank(weights[name]) >= 1 for name in W)
    exact = choose(10_000)
    for name in W:
        np.testing.assert_allclose(exact[name], W[name], atol=1e-4)


@pytest.mark.parametrize("start", projection.STARTS)
def test_the_published_procedure_starts_anywhere_within_its_budget(start):
    W = np.random.RandomState(0).standard_normal((24, 24))
    first = torch.from_numpy(projection.starting_point(start, W, 0))
    *_, (left, right) = published_dsf(torch.from_numpy(W), 0.5, start=first)
    assert (left != 0).sum() + (right != 0).sum() <= 288
    assert torch.linalg.norm(left @ right - torch.from_numpy(W)) < 0.5 * np.linalg.norm(W)


@pytest.mark.parametrize("n_factors", [1, 2])
def test_one_and_two_sparse_matrices_store_the_same(n_factors):
    product = sparse_inference.sparse(64, 0.25, n_factors, np.random.RandomState(0))
    assert len(product) == n_factors
    assert product.nnz == 1024
