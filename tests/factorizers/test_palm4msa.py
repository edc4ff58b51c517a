"""Palm4MSA: budgets, exact cases, constraints by name, warm starts, errors."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from matfact import DoubleSparseFactorizer, MagnitudePruner, Palm4MSA, metrics
from matfact.constraints import (
    ColumnSparsity,
    FixedSupport,
    GlobalSparsity,
    MaxRank,
    NMSparsity,
    RowColumnSparsity,
    RowSparsity,
    UnitNormColumns,
)
from matfact.operators import DenseFactor, SparseFactor


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    n_factors=st.integers(1, 4),
    density=st.floats(0.01, 1.0),
)
@example(rows=1, columns=1, n_factors=1, density=1 - 2**-53)
@settings(deadline=None, max_examples=25)
def test_density_is_never_exceeded(rows, columns, n_factors, density):
    W = np.random.default_rng(rows * columns).standard_normal((rows, columns))
    model = Palm4MSA(density, n_factors, max_iter=10)
    if metrics.part_of(W.size, density) < metrics.least_chain(W.shape, n_factors):
        with pytest.raises(ValueError, match="density"):
            model.fit(W)
    else:
        assert model.fit(W).nnz_ / W.size <= density


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 12), (12, 7)])
@pytest.mark.parametrize("hierarchical", [None, "left", "right"])
def test_default_density_works_on_every_shape(shape, hierarchical, rng):
    model = Palm4MSA(n_factors=3, hierarchical=hierarchical).fit(rng.standard_normal(shape))
    assert len(model.factors_) == 3
    assert model.operator_.shape == shape
    assert np.isfinite(model.reconstruction_err_)


@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (48, 96)])
def test_the_whole_budget_is_used_and_beats_magnitude_pruning(shape, rng):
    W = rng.standard_normal(shape)
    model = Palm4MSA(density=0.25).fit(W)
    assert model.nnz_ == W.size // 4
    assert model.normalized_err_ < 0.9


def test_one_factor_is_magnitude_pruning(rng):
    W = rng.standard_normal((15, 11))
    pruned = MagnitudePruner(density=0.3).fit(W)
    model = Palm4MSA(density=0.3, n_factors=1).fit(W)
    np.testing.assert_array_equal(model.operator_.toarray(), pruned.operator_.toarray())


def test_transposing_the_matrix_transposes_the_fit(rng):
    W = rng.standard_normal((40, 20))
    tall, wide = Palm4MSA(max_iter=10).fit(W), Palm4MSA(max_iter=10).fit(np.ascontiguousarray(W.T))
    np.testing.assert_allclose(tall.operator_.toarray().T, wide.operator_.toarray(), atol=1e-9)


@pytest.mark.parametrize("n", [16, 128])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hierarchical_fit_recovers_hadamard(n, side):
    supports = [
        FixedSupport(np.kron(np.kron(np.eye(1 << i), np.ones((2, 2))), np.eye(n >> i + 1)))
        for i in range(n.bit_length() - 1)
    ]
    model = Palm4MSA(constraints=supports, hierarchical=side).fit(scipy.linalg.hadamard(n))
    assert model.nnz_ == 2 * n * len(supports)
    assert model.reconstruction_err_ < 1e-14


@pytest.mark.parametrize("n", [4, 16, 32, 128])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hierarchical_fit_finds_the_supports_of_hadamard(n, side):
    sets = [RowColumnSparsity(2)] * (n.bit_length() - 1)
    model = Palm4MSA(constraints=sets, hierarchical=side).fit(scipy.linalg.hadamard(n))
    assert model.nnz_ == 2 * n * len(sets)
    assert model.reconstruction_err_ < 1e-14


@pytest.mark.parametrize("kind", [RowSparsity, ColumnSparsity, RowColumnSparsity])
def test_residuals_may_be_as_full_as_products_of_what_they_stand_for(kind, rng):
    W = rng.standard_normal((12, 12))
    sets = [kind(2), kind(2), kind(3), kind(2)]
    default, explicit = (
        Palm4MSA(constraints=sets, hierarchical="left", residual_constraints=r, max_iter=5).fit(W)
        for r in (None, [kind(12), kind(6)])
    )
    np.testing.assert_array_equal(default.operator_.toarray(), explicit.operator_.toarray())


def test_planted_sparse_factors_are_recovered_from_a_noisy_start(rng):
    left, right = (np.eye(48) + _sparse(rng, 48, 200) for _ in range(2))
    sets = [GlobalSparsity(np.count_nonzero(factor)) for factor in (left, right)]
    start = [left + 0.1 * rng.standard_normal((48, 48)), right]
    model = Palm4MSA(constraints=sets, init=start, max_iter=300).fit(left @ right)
    assert model.reconstruction_err_ < 0.02


def _sparse(rng, n, nnz):
    array = np.zeros(n * n)
    array[rng.choice(n * n, nnz, replace=False)] = rng.standard_normal(nnz)
    return array.reshape(n, n)


def test_a_warm_start_is_never_made_worse(rng):
    W = rng.standard_normal((30, 40))
    cold = Palm4MSA(max_iter=30).fit(W)
    start = [factor.toarray() for factor in cold.factors_]
    warm = Palm4MSA(max_iter=5, init=start).fit(W)
    assert warm.reconstruction_err_ <= cold.reconstruction_err_ * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(48, 48), (64, 32), (32, 64)])
def test_a_start_from_double_sparse_factors_improves_on_them(shape, rng):
    W = rng.standard_normal(shape)
    double_sparse = DoubleSparseFactorizer(density=0.3).fit(W)
    for init in ("dsf", double_sparse.operator_):
        model = Palm4MSA(density=0.3, init=init).fit(W)
        assert model.nnz_ <= 0.3 * W.size
        assert model.reconstruction_err_ <= double_sparse.reconstruction_err_
    assert model.reconstruction_err_ < Palm4MSA(density=0.3).fit(W).reconstruction_err_


def test_a_start_from_double_sparse_factors_keeps_to_the_sets(rng):
    W = rng.standard_normal((16, 24))
    sets = [RowSparsity(4), NMSparsity(2, 4)]
    cold = Palm4MSA(constraints=sets).fit(W)
    warm = Palm4MSA(constraints=sets, init="dsf").fit(W)
    for constraint, factor in zip(sets, warm.factors_, strict=True):
        np.testing.assert_array_equal(constraint.project(factor.toarray()), factor.toarray())
    assert warm.reconstruction_err_ < cold.reconstruction_err_


def test_a_start_from_the_svd_suits_low_rank_and_noise(rng):
    W = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 64))
    W += 0.3 * rng.standard_normal((64, 64))
    cold, warm = (Palm4MSA(init=init).fit(W).reconstruction_err_ for init in (None, "svd"))
    assert warm < cold


def test_a_start_from_the_svd_may_be_complex(rng):
    W = rng.standard_normal((8, 12)) + 1j * rng.standard_normal((8, 12))
    model = Palm4MSA(constraints=[RowSparsity(4), RowSparsity(4)], init="svd").fit(W)
    assert model.reconstruction_err_ < 1


def test_a_start_sets_the_inner_dimensions(rng):
    W = rng.standard_normal((12, 16))
    start = [rng.standard_normal((12, 20)), rng.standard_normal((20, 16))]
    model = Palm4MSA(density=0.5, init=start).fit(W)
    assert [factor.shape for factor in model.factors_] == [(12, 20), (20, 16)]


def test_constraints_hold_factor_by_factor(rng):
    W = rng.standard_normal((16, 24))
    model = Palm4MSA(constraints=[RowSparsity(3), NMSparsity(2, 4)]).fit(W)
    first, second = (factor.toarray() for factor in model.factors_)
    assert np.count_nonzero(first, axis=1).max() <= 3
    assert np.count_nonzero(second.reshape(16, 6, 4), axis=2).max() <= 2


def test_constraints_may_be_named_and_mixed(rng):
    W = rng.standard_normal((16, 16))
    model = Palm4MSA(constraints=["toeplitz", ColumnSparsity(4)]).fit(W)
    toeplitz = model.factors_[0].toarray()
    np.testing.assert_allclose(toeplitz[1:, 1:], toeplitz[:-1, :-1], atol=1e-13)


def test_norms_of_a_dictionary_stay_equal(rng):
    W = rng.standard_normal((16, 24))
    model = Palm4MSA(constraints=[UnitNormColumns(), ColumnSparsity(4)]).fit(W)
    norms = np.linalg.norm(model.factors_[0].toarray(), axis=0)
    np.testing.assert_allclose(norms, norms[0])


def test_each_factor_is_stored_in_the_fewest_values(rng):
    W = rng.standard_normal((16, 24))
    model = Palm4MSA(constraints=[MaxRank(2), "non_negative", GlobalSparsity(60)]).fit(W)
    kinds = [type(factor) for factor in model.factors_]
    assert kinds[:2] == [DenseFactor, DenseFactor]
    assert kinds[-1] is SparseFactor
    assert model.factors_[0].shape == (16, 2)


def test_a_start_from_lists_is_accepted(rng):
    W = rng.standard_normal((6, 6)).astype(np.float32)
    model = Palm4MSA(density=0.5, init=[np.eye(6).tolist(), W.tolist()]).fit(W)
    assert model.operator_.dtype == np.float32


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 0.01}, "density=0.01 allows 0"),
        ({"n_factors": 0}, "n_factors"),
        ({"hierarchical": "up"}, "hierarchical"),
        ({"density": 0.5, "constraints": ["toeplitz"]}, "density must be None"),
        ({"constraints": ["sparse"]}, r"constraints\[0\]='sparse'"),
        ({"constraints": ["row_sparsity"]}, r"constraints\[0\]='row_sparsity'"),
        ({"constraints": [3]}, r"constraints\[0\] must be a Constraint"),
        ({"constraints": []}, "constraints must hold"),
        ({"constraints": ["toeplitz", "circulant"]}, r"constraints\[1\].*square"),
        ({"init": [np.eye(4)]}, "init must hold factors whose shapes chain"),
        ({"init": [np.eye(4), np.full((4, 6), np.nan)]}, r"init\[1\] must be finite"),
        ({"n_factors": 3, "init": [np.eye(4), np.ones((4, 6))]}, "init must hold 3 factors"),
        ({"hierarchical": "left", "init": [np.eye(4), np.ones((4, 6))]}, "init must be None"),
        ({"hierarchical": "left", "init": "dsf"}, "init must be None"),
        ({"n_factors": 3, "init": "svd"}, "init='svd' needs two factors, got 3"),
        ({"init": "best"}, "init"),
        ({"init": "dsf", "constraints": ["toeplitz", "toeplitz"]}, "sparsity or a support"),
        (
            {"hierarchical": "left", "residual_constraints": ["toeplitz"]},
            "residual_constraints must hold 0",
        ),
    ],
)
def test_bad_parameters_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        Palm4MSA(**parameters).fit(np.ones((4, 6)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)
