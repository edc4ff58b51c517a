"""What is particular to DoubleSparseFactorizer."""

import re
import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from matfact import DoubleSparseFactorizer, MagnitudePruner, Palm4MSA
from matfact.constraints import (
    BlockSparsity,
    Diagonal,
    FixedSupport,
    MaxRank,
    NMSparsity,
    RowSparsity,
)


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


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize(
    "constraint", [NMSparsity(2, 4), RowSparsity(5), BlockSparsity(12), Diagonal()]
)
def test_constraints_hold_in_either_factor(rng, shape, constraint):
    W = rng.standard_normal(shape)
    side = min(shape)
    for i, factor_shape in enumerate([(shape[0], side), (side, shape[1])]):
        sets = [None, None]
        sets[i] = constraint
        stored = constraint.nnz(factor_shape)
        density = (stored + 100) / W.size
        model = DoubleSparseFactorizer(density=density, constraints=sets, max_iter=10).fit(W)
        assert model.density_ <= density
        assert model.factors_[1 - i].nnz <= 100
        found = model.factors_[i].toarray()
        assert found.shape == factor_shape
        np.testing.assert_array_equal(constraint.project(found), found)


def test_both_factors_can_be_constrained(rng):
    W = rng.standard_normal((32, 48))
    sets = (NMSparsity(1, 4), "diagonal")
    model = DoubleSparseFactorizer(constraints=sets, max_iter=10).fit(W)
    first, second = (factor.toarray() for factor in model.factors_)
    np.testing.assert_array_equal(NMSparsity(1, 4).project(first), first)
    np.testing.assert_array_equal(Diagonal().project(second), second)


def test_a_mask_fixed_in_advance_costs_no_more_than_pruning_by_a_tenth(rng):
    W = rng.standard_normal((64, 64))
    mask = FixedSupport.random(W.shape, 256, random_state=0)
    model = DoubleSparseFactorizer(density=0.25, constraints=(mask, None)).fit(W)
    assert not np.any(model.factors_[0].toarray()[~mask.support_mask])
    assert model.normalized_err_ < 1.1


def test_row_budgets_cost_little_against_one_budget(rng):
    W = rng.standard_normal((64, 64))
    free = DoubleSparseFactorizer(density=0.25).fit(W)
    rows = DoubleSparseFactorizer(constraints=[RowSparsity(8), RowSparsity(8)]).fit(W)
    assert rows.reconstruction_err_ < 1.1 * free.reconstruction_err_


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"constraints": [None, None]}, "constraints must hold a set"),
        ({"constraints": [Diagonal()]}, "constraints must hold two sets, got 1"),
        ({"constraints": ["diagonal", "sparse"]}, r"constraints\[1\]='sparse'"),
        ({"constraints": ["diagonal", "row_sparsity"]}, r"constraints\[1\]='row_sparsity'"),
        ({"constraints": ["diagonal", 3]}, r"constraints\[1\] must be a Constraint"),
        ({"constraints": [MaxRank(2), None]}, r"constraints\[0\] must be a sparsity or a support"),
        ({"constraints": [FixedSupport(np.eye(3)), None]}, r"constraints\[0\]: support_mask"),
        ({"constraints": ["diagonal"] * 2, "density": 0.5}, "density must be None with two"),
        ({"constraints": ["diagonal", None], "density": 0.05}, "density=0.05 allows 20 stored"),
        ({"constraints": ["diagonal", None], "first_factor_density": 0.1}, "must be 'auto' with"),
    ],
)
def test_bad_constraints_are_refused(rng, parameters, message):
    with pytest.raises(ValueError, match=message):
        DoubleSparseFactorizer(**parameters).fit(rng.standard_normal((20, 20)))


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_fast_transforms_are_not_left_to_regression(density):
    dct = scipy.linalg.dft(8).real
    model = DoubleSparseFactorizer(density=density).fit(np.kron(dct, dct))
    assert model.normalized_err_ < 0.5
    assert model.density_ <= density


def test_factors_are_balanced(rng):
    model = DoubleSparseFactorizer().fit(rng.standard_normal((30, 40)))
    first, second = (factor.toarray() for factor in model.factors_)
    columns, rows = np.linalg.norm(first, axis=0), np.linalg.norm(second, axis=1)
    # Equal but for the power of two that scales all of W.
    np.testing.assert_allclose(rows, columns * rows[0] / columns[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_and_dense_products_find_the_same(rng, dtype, monkeypatch):
    W = rng.standard_normal((70, 90)).astype(dtype)
    sparse = DoubleSparseFactorizer(max_iter=5).fit(W)
    monkeypatch.setattr("matfact.kernels.products.DENSE", 0.0)
    dense = DoubleSparseFactorizer(max_iter=5).fit(W)
    tolerance = 1e4 * np.finfo(dtype).eps
    assert abs(sparse.reconstruction_err_ - dense.reconstruction_err_) < tolerance


@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128)])
def test_a_fit_takes_no_more_than_twelve_times_the_memory_of_its_matrix(rng, shape):
    W = rng.standard_normal(shape).astype(np.float32)
    model = DoubleSparseFactorizer(max_iter=40).fit(W)  # compiles
    tracemalloc.start()
    model.fit(W)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 12 * W.nbytes


@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (50, 20)])
@pytest.mark.parametrize("n_factors", [3, 4])
def test_more_factors_share_the_budget(rng, shape, n_factors):
    W = rng.standard_normal(shape)
    model = DoubleSparseFactorizer(density=0.5, n_factors=n_factors, max_iter=30).fit(W)
    side = min(shape)
    assert [f.shape for f in model.factors_].count((side, side)) >= n_factors - 1
    assert len(model.factors_) == n_factors
    assert model.density_ <= 0.5
    assert model.reconstruction_err_ < 0.7


def test_product_of_three_sparse_matrices_is_approximated(rng):
    A, B, C = (
        np.where(rng.random((64, 64)) < 0.05, rng.standard_normal((64, 64)), 0) for _ in "ABC"
    )
    model = DoubleSparseFactorizer(density=0.3, n_factors=3).fit(A @ B @ C)
    assert model.reconstruction_err_ < 0.1


@pytest.mark.parametrize(
    "options", [{"first_factor_density": 0.1}, {"constraints": [NMSparsity(2, 4), None]}]
)
def test_settings_of_two_factors_are_refused_for_more(rng, options):
    model = DoubleSparseFactorizer(n_factors=3, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* with n_factors=3"):
        model.fit(rng.standard_normal((20, 20)))


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24)])
def test_matrices_of_low_rank_are_found_exactly_in_few_sweeps(shape):
    rng = np.random.RandomState(0)
    for W in (np.full(shape, 7.0), rng.randn(shape[0], 2) @ rng.randn(2, shape[1])):
        fitted = DoubleSparseFactorizer(density=0.5, max_iter=5).fit(W)
        assert fitted.reconstruction_err_ < 1e-12
        assert fitted.density_ <= 0.5


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("density", [None, 0.51])
def test_a_constraint_that_leaves_next_to_nothing_is_refused_with_a_density_that_works(
    shape, place, density
):
    W = np.random.default_rng(0).standard_normal(shape)
    sets = [None, None]
    sets[place] = NMSparsity(3, 4)
    with pytest.raises(ValueError, match=r"density=.* stored values .* at least 0\.\d") as refused:
        DoubleSparseFactorizer(density, constraints=sets).fit(W)
    least, good = map(float, re.findall(r"(?:at least|better) (\d\.?\d*)", str(refused.value)))
    for works, error in ((least, 0.9), (good, 0.4)):
        model = DoubleSparseFactorizer(works, constraints=sets, max_iter=20).fit(W)
        assert model.density_ <= works
        assert model.reconstruction_err_ < error


def test_a_constraint_that_leaves_nothing_at_any_density_is_refused():
    with pytest.raises(ValueError, match="choose a constraint that leaves more"):
        DoubleSparseFactorizer(constraints=[NMSparsity(4, 4), None]).fit(np.eye(8))


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (32, 48)])
def test_two_factors_are_never_worse_than_the_constrained_one_alone(shape):
    W = np.random.default_rng(0).standard_normal(shape)
    place = int(shape[0] < shape[1])  # of the factor that has the shape of W
    sets = [None, None]
    sets[place] = NMSparsity(2, 4)
    free = 1 - place
    stored = W.size // 2 + 32
    model = DoubleSparseFactorizer(stored / W.size, constraints=sets, max_iter=5).fit(W)
    alone = MagnitudePruner(constraint=NMSparsity(2, 4)).fit(W)
    assert model.reconstruction_err_ <= alone.reconstruction_err_
    assert model.factors_[free].nnz <= 32


@pytest.mark.parametrize("make", [DoubleSparseFactorizer, Palm4MSA])
def test_many_factors_have_a_value_for_each_row_or_a_density_that_does_is_named(make):
    W = np.random.default_rng(0).standard_normal((12, 12))
    with pytest.raises(ValueError, match=r"at least 108 .* 0\.75"):
        make(density=0.3, n_factors=9).fit(W)
    for model in (make(n_factors=9), make(density=0.75, n_factors=9)):
        assert model.set_params(max_iter=10).fit(W).reconstruction_err_ < 0.8
