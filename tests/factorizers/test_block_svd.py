"""Block-wise low rank as an estimator."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from matfact import backend
from matfact.factorizers import BlockSVD, LowRank

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 40), st.integers(4, 40), st.floats(0.3, 1.0), st.just("auto") | GRIDS)
def test_density_is_never_exceeded_and_nearly_used(rows, columns, density, blocking):
    W = np.random.RandomState(rows).randn(rows, columns)
    assume(density * W.size >= rows + columns)
    model = BlockSVD(density, blocking).fit(W)
    # Keeping every triple would take more than W.size, so that less than one triple is left over.
    assert density * W.size - rows - columns < model.nnz_ <= density * W.size


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(64, 64), (33, 80), (97, 40)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_never_worse_than_low_rank(shape, density, calibrated):
    rng = np.random.RandomState(0)
    W = rng.randn(shape[0], 5) @ rng.randn(5, shape[1]) + rng.randn(*shape)
    X = rng.randn(200, shape[1]) @ rng.randn(shape[1], shape[1]) if calibrated else None
    block = BlockSVD(density).fit(W, calibration=X)
    whole = LowRank(density=density).fit(W, calibration=X)
    name = "layer_err_" if calibrated else "reconstruction_err_"
    assert getattr(block, name) <= getattr(whole, name) * (1 + 1e-6)


def test_a_planted_grid_of_low_rank_blocks_is_found():
    rng = np.random.RandomState(0)
    blocks = [[rng.randn(16, 1) @ rng.randn(1, 16) for _ in range(4)] for _ in range(4)]
    W = np.block(blocks)
    model = BlockSVD(density=0.125).fit(W)
    assert model.blocking_ == (4, 4)
    assert model.reconstruction_err_ < 1e-14
    assert (model.ranks_ == 1).all()


@pytest.mark.parametrize("blocking", ["whole", "strips", "square", (3, 2)])
def test_more_budget_never_hurts(blocking):
    W = np.random.RandomState(0).randn(20, 45)
    errors = [BlockSVD(d, blocking).fit(W).reconstruction_err_ for d in (0.1, 0.2, 0.4, 0.8)]
    assert errors == sorted(errors, reverse=True)


def test_whole_is_the_truncated_svd():
    W = np.random.RandomState(0).randn(12, 20)
    np.testing.assert_allclose(
        BlockSVD(0.3, "whole").fit(W).operator_.toarray(),
        LowRank(density=0.3).fit(W).operator_.toarray(),
        atol=1e-13,
    )


RANKINGS = ["energy", "magnitude", "relative_error", "output_perturbation", "output_variance"]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("blocking", ["auto", "strips", "square", (3, 2)])
def test_every_ranking_keeps_to_the_budget_and_energy_is_best(ranking, blocking):
    rng = np.random.RandomState(0)
    W, X = rng.randn(25, 44), rng.randn(90, 44) * np.linspace(0.1, 2, 44) + 1
    model = BlockSVD(0.4, blocking, ranking).fit(W, calibration=X)
    assert model.nnz_ <= 0.4 * W.size
    best = BlockSVD(0.4, blocking).fit(W, calibration=X)
    assert best.layer_err_ <= model.layer_err_ * 1.02


def test_singular_values_and_relative_errors_order_one_matrix_alike():
    W = np.random.RandomState(0).randn(20, 45)
    by_value, by_error = (
        BlockSVD(0.3, (3, 2), ranking).fit(W).operator_.toarray()
        for ranking in ("magnitude", "relative_error")
    )
    np.testing.assert_array_equal(by_value, by_error)


@pytest.mark.parametrize("asarray", [torch.asarray, array_api_strict.asarray])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_library_finds_the_same(asarray, calibrated):
    rng = np.random.RandomState(0)
    W, X = rng.randn(24, 40), rng.randn(90, 40)
    reference = BlockSVD().fit(W, calibration=X if calibrated else None)
    model = BlockSVD().fit(asarray(W), calibration=asarray(X) if calibrated else None)
    assert model.blocking_ == reference.blocking_
    np.testing.assert_allclose(
        backend.to_numpy(model.operator_.toarray()), reference.operator_.toarray(), atol=1e-11
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"blocking": (0, 1)}, "blocking must be"),
        ({"blocking": (1, 99)}, "blocking must be"),
        ({"blocking": (1, 1, 1)}, "blocking must be"),
        ({"blocking": "diagonal"}, "blocking"),
        ({"ranking": "output_variance"}, "needs calibration inputs"),
        ({"density": 0.01}, "density=0.01"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        BlockSVD(**params).fit(np.ones((6, 8)))


@pytest.mark.parametrize(
    ("shape", "bound"),
    [((64, 64), 1e-13), ((40, 80), 1e-13), ((50, 83), 0.1)],  # groups of unequal sizes: nearly
)
def test_a_planted_grid_is_found_behind_permutations(shape, bound):
    rng = np.random.RandomState(0)
    rows, columns = (np.array_split(np.arange(n), 4) for n in shape)
    W = np.zeros(shape)
    for r in rows:
        for c in columns:
            W[np.ix_(r, c)] = rng.randn(len(r), 1) @ rng.randn(1, len(c))
    W = W[rng.permutation(shape[0])][:, rng.permutation(shape[1])]
    density = 4 * sum(shape) / W.size
    plain, permuted = (
        BlockSVD(density, (4, 4), permute=permute).fit(W) for permute in (False, True)
    )
    assert permuted.density_ <= density
    assert permuted.reconstruction_err_ < bound < plain.reconstruction_err_ / 4


@pytest.mark.parametrize("blocking", ["auto", (2, 3)])
def test_permuting_takes_the_inputs_along(blocking):
    rng = np.random.RandomState(0)
    W, X = rng.randn(24, 45), rng.randn(90, 45) * np.linspace(0.1, 2, 45)
    model = BlockSVD(0.4, blocking, permute=True).fit(W, calibration=X)
    plain = BlockSVD(0.4, blocking).fit(W, calibration=X)
    error = np.linalg.norm(X @ (W - model.operator_.toarray()).T) / np.linalg.norm(X @ W.T)
    assert model.layer_err_ == pytest.approx(error)
    assert model.layer_err_ <= plain.layer_err_ * 1.02
