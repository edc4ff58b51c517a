"""Singular triples of several matrices: one ranking, and the minimax ranks of ALDS."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.allocation import (
    alds_ranks,
    magnitude_scores,
    rank_triples,
    relative_error_scores,
    strip_spectra,
    truncated_blocks,
)
from matfact.solvers.block_svd import Blocking


def stored(kept, costs):
    return sum(len(k) * c for name in kept for k, c in zip(kept[name], costs[name], strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(15, 300), st.booleans())
def test_budget_is_never_exceeded_and_no_better_triple_is_left_out(seed, n, budget, per_value):
    rng = np.random.default_rng(seed)
    scores = {f"layer {i}": [rng.random(5), rng.random(3)] for i in range(n)}
    costs = {name: rng.integers(5, 15, 2) for name in scores}
    kept = rank_triples(scores, costs, budget, per_value=per_value)
    spent = stored(kept, costs)
    assert spent <= budget
    assert spent > 0
    # A triple that would still fit is not worth keeping, or is kept.
    for name, b in itertools.product(scores, range(2)):
        if costs[name][b] <= budget - spent:
            assert len(kept[name][b]) == len(scores[name][b])


def test_the_ranking_is_over_all_matrices():
    scores = {"a": [np.array([9.0, 1.0])], "b": [np.array([8.0, 7.0])], "c": [np.array([2.0])]}
    kept = rank_triples(scores, {name: np.array([1]) for name in scores}, 3)
    assert [list(kept[name][0]) for name in "abc"] == [[0], [0, 1], []]


def test_scores_per_value_prefer_cheap_triples():
    scores = {"dear": [np.array([3.0])], "cheap": [np.array([2.0])]}
    costs = {"dear": np.array([10]), "cheap": np.array([5])}
    assert len(rank_triples(scores, costs, 10)["dear"][0]) == 1
    assert len(rank_triples(scores, costs, 10, per_value=True)["cheap"][0]) == 1


def test_relative_errors_do_not_depend_on_the_scale_of_a_layer():
    W = np.random.default_rng(0).standard_normal((8, 6))
    spectrum = np.linalg.svdvals(W)
    for scale in (1e-3, 1e3):
        (scores,) = relative_error_scores([scale * spectrum], scale * spectrum[0])
        np.testing.assert_allclose(scores, spectrum / spectrum[0])
    np.testing.assert_array_equal(magnitude_scores([spectrum])[0], spectrum)
    assert not relative_error_scores([np.zeros(3)], 0.0)[0].any()


def test_strip_spectra_are_operator_norm_errors():
    W = np.random.default_rng(0).standard_normal((6, 12))
    errors = strip_spectra(W, [1, 3])
    blocks = np.split(W, 3, axis=1)
    for rank in range(5):
        left = [np.linalg.svdvals(block)[rank] if rank < 4 else 0.0 for block in blocks]
        assert errors[3][rank] == pytest.approx(max(left) / np.linalg.norm(W, 2))
    assert errors[1][0] == pytest.approx(1)
    with pytest.raises(ValueError, match="strips must divide"):
        strip_spectra(W, [5])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_kept_triples_make_the_product_that_was_counted(grid):
    W = np.random.default_rng(0).standard_normal((7, 11))
    blocking = Blocking(W.shape, grid)
    spectra = [np.linalg.svdvals(block) for block in blocking.cut(W)]
    kept = rank_triples({"W": magnitude_scores(spectra)}, {"W": blocking.costs}, 40)["W"]
    product = truncated_blocks(W, kept, grid)
    assert product.nnz == sum(len(k) * c for k, c in zip(kept, blocking.costs, strict=True)) <= 40
    lost = sum(np.sum(np.delete(s, k) ** 2) for s, k in zip(spectra, kept, strict=True))
    assert np.linalg.norm(W - product.toarray()) == pytest.approx(np.sqrt(lost))


def layers(seed, n, strips=(1, 2, 3)):
    rng = np.random.default_rng(seed)
    matrices = {
        f"layer {i}": rng.standard_normal((6, 6)) * 0.5 ** (rng.random() * np.arange(6))
        for i in range(n)
    }
    errors = {name: strip_spectra(W, strips) for name, W in matrices.items()}
    return errors, {name: W.shape for name, W in matrices.items()}


def least_error(errors, shapes, budget):
    """Try everything."""
    options = [
        [
            (k, r, curve[r], r * (k * shapes[name][0] + shapes[name][1]))
            for k, curve in errors[name].items()
            for r in range(1, len(curve))
        ]
        for name in errors
    ]
    return min(
        max(option[2] for option in choice)
        for choice in itertools.product(*options)
        if sum(option[3] for option in choice) <= budget
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(24, 150))
def test_alds_with_whole_matrices_is_the_best_there_is(seed, budget):
    errors, shapes = layers(seed, 2, strips=[1])
    ranks, error = alds_ranks(errors, shapes, budget)
    assert error == pytest.approx(least_error(errors, shapes, budget))
    assert sum(r.rank * 12 for r in ranks.values()) <= budget


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(24, 150))
def test_alds_stays_in_the_budget_and_strips_never_hurt(seed, budget):
    errors, shapes = layers(seed, 2)
    ranks, error = alds_ranks(errors, shapes, budget)
    cost = sum(r.rank * (r.strips * shapes[name][0] + shapes[name][1]) for name, r in ranks.items())
    assert cost <= budget
    assert error == max(errors[name][r.strips][r.rank] for name, r in ranks.items())
    assert error >= least_error(errors, shapes, budget)


def test_alds_refuses_what_does_not_fit():
    errors, shapes = layers(0, 2)
    with pytest.raises(ValueError, match="budget must be at least 24"):
        alds_ranks(errors, shapes, 23)


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [({"a": np.array([5, 5])}, 9, "costs must hold"), ({"a": np.array([5])}, 4, "budget must be")],
)
def test_bad_budgets_are_refused(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        rank_triples({"a": [np.ones(2)]}, costs, budget)


def test_what_cannot_be_ranked_is_refused_by_name():
    scores = {"good": [np.ones(2)], "bad": [np.array([1.0, np.nan])]}
    with pytest.raises(ValueError, match="scores must be finite, but those of 'bad'"):
        rank_triples(scores, {"good": np.array([4]), "bad": np.array([4])}, 8)
    errors = {"bad": {1: np.array([np.nan, 0.5, 0.0])}}
    with pytest.raises(ValueError, match="errors must be finite, but those of 'bad'"):
        alds_ranks(errors, {"bad": (2, 2)}, 8)
