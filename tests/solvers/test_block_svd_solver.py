"""Blockings and the common ranking of singular triples."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.calibration import InputStatistics
from matfact.solvers.block_svd import (
    Blocking,
    block_svd,
    blocking_error,
    candidate_blockings,
    reconstruct,
    select_triples,
    square_grid,
)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_blocks_tile_the_matrix(rows, columns, data):
    grid = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns)))
    blocking = Blocking((rows, columns), grid)
    cover = np.zeros((rows, columns), dtype=int)
    for r0, r1, c0, c1 in blocking.spans:
        cover[r0:r1, c0:c1] += 1
    assert (cover == 1).all()
    assert np.ptp(blocking.costs) <= 2


@pytest.mark.parametrize(
    ("shape", "grid"), [((8, 8), (1, 1)), ((64, 576), (1, 9)), ((30, 7), (4, 1)), ((1, 5), (1, 5))]
)
def test_square_blocks_are_as_large_as_can_be(shape, grid):
    assert square_grid(shape) == grid


def test_the_whole_matrix_is_the_first_candidate():
    assert all(candidate_blockings(s)[0].grid == (1, 1) for s in [(1, 1), (100, 3), (64, 64)])


def test_selection_is_the_best_of_all_subsets_when_costs_are_equal():
    rng = np.random.RandomState(0)
    scores = [rng.rand(3), rng.rand(2), rng.rand(3)]
    flat = np.concatenate(scores)
    for kept in range(1, 9):
        chosen = select_triples(scores, np.full(3, 5), 5 * kept + 4)
        total = sum(s[k].sum() for s, k in zip(scores, chosen, strict=True))
        assert total == pytest.approx(max(map(sum, itertools.combinations(flat, kept))))


def test_a_triple_that_does_not_fit_leaves_room_for_a_smaller_one():
    chosen = select_triples([np.array([3.0, 2.0]), np.array([1.0])], np.array([10, 4]), 14)
    assert [k.tolist() for k in chosen] == [[0], [0]]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("n_samples", [0, 2, 40])
def test_the_foretold_error_is_reached(grid, n_samples):
    rng = np.random.RandomState(0)
    W = rng.randn(13, 9)
    blocking = Blocking(W.shape, grid)
    calibration = InputStatistics().update(rng.randn(n_samples, 9)) if n_samples else None
    factors = block_svd(W, blocking, 60, calibration=calibration)
    lost = W - reconstruct(factors, blocking)
    H = np.eye(9) if calibration is None else calibration.gram
    expected = np.trace(lost @ H @ lost.T) / np.trace(W @ H @ W.T)
    error = blocking_error(W, blocking, 60, calibration=calibration)
    assert error == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_data_rankings_equal_the_measured_loss_of_each_triple(centred):
    rng = np.random.RandomState(0)
    W, X = rng.randn(4, 5), rng.randn(30, 5) * [1, 9, 1, 1, 1] + 2.0
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    lost = s * np.einsum("ij,rj->ir", X, Vh)  # of every input, along each left vector
    measured = lost.var(axis=0) if centred else (lost**2).mean(axis=0)
    best = int(np.argmax(measured))
    ranking = "output_variance" if centred else "output_perturbation"
    calibration = InputStatistics().update(X)
    ((left, right),) = block_svd(W, Blocking((4, 5), (1, 1)), 9, ranking, calibration)
    np.testing.assert_allclose(left @ right, s[best] * np.outer(U[:, best], Vh[best]), atol=1e-12)
    assert best != 0  # the largest singular value is not the answer
