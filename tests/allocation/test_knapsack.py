"""The choice of one option a layer, against all choices."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.allocation import select


def least_error(costs, errors, budget):
    """Return the least error within the budget by looking at every choice."""
    best = math.inf
    for choice in itertools.product(*(range(len(layer)) for layer in costs)):
        total = sum(Fraction(layer[k]) for layer, k in zip(costs, choice, strict=True))
        if total <= Fraction(budget):
            error = math.fsum(layer[k] for layer, k in zip(errors, choice, strict=True))
            best = min(best, error)
    return best


def problems(cost, error):
    layer = st.lists(st.tuples(cost, error), min_size=1, max_size=5)
    return st.lists(layer, min_size=1, max_size=5)


def check(problem, budget, **options):
    costs = [[cost for cost, _ in layer] for layer in problem]
    errors = [[error for _, error in layer] for layer in problem]
    best = least_error(costs, errors, budget)
    if best == math.inf:
        with pytest.raises(ValueError, match="budget="):
            select(costs, errors, budget, **options)
        return None
    found = select(costs, errors, budget, **options)
    chosen = list(zip(costs, errors, found.choices, strict=True))
    assert sum(Fraction(cost[k]) for cost, _, k in chosen) <= Fraction(budget)
    assert found.cost == math.fsum(cost[k] for cost, _, k in chosen)
    assert found.error == math.fsum(error[k] for _, error, k in chosen)
    assert found.lower_bound <= best + 1e-12 * max(1.0, best)
    return found, best


@settings(deadline=None, max_examples=100)
@given(problem=problems(st.integers(0, 40), st.floats(0, 10)), budget=st.integers(1, 150))
def test_no_other_choice_within_the_budget_has_less_error(problem, budget):
    result = check(problem, budget)
    if result is not None:
        found, best = result
        assert found.error == pytest.approx(best, rel=1e-12, abs=1e-12)
        assert found.lower_bound == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(problem=problems(st.integers(0, 40), st.integers(0, 9)), budget=st.integers(1, 150))
def test_ties_are_no_obstacle(problem, budget):
    result = check(problem, budget)
    if result is not None:
        assert result[0].error == result[1]


@settings(deadline=None, max_examples=50)
@given(problem=problems(st.floats(0, 1), st.floats(0, 1)), budget=st.floats(1e-3, 4))
def test_costs_that_are_not_whole_never_exceed_the_budget(problem, budget):
    costs = [[cost for cost, _ in layer] for layer in problem]
    errors = [[error for _, error in layer] for layer in problem]
    # Costs are rounded up by less than one part in 2⁵² of the budget.
    best = least_error(costs, errors, budget * (1 - 1e-14))
    if best == math.inf:
        return
    found = select(costs, errors, budget)
    spent = sum(Fraction(layer[k]) for layer, k in zip(costs, found.choices, strict=True))
    assert spent <= Fraction(budget)
    assert found.error <= best + 1e-12


@settings(deadline=None, max_examples=50)
@given(problem=problems(st.integers(0, 40), st.floats(0, 10)), budget=st.integers(1, 150))
def test_a_search_cut_short_says_what_it_may_have_missed(problem, budget):
    check(problem, budget, max_states=1)


def curves(n_layers, seed=0):
    """Return convex curves, as of layers of a network, with costs in bytes."""
    rng = np.random.RandomState(seed)
    density = np.linspace(0.05, 1, 30)
    sizes = rng.choice([147_456, 589_824, 331_776], n_layers)
    rates, scales = 1 + 4 * rng.random_sample(n_layers), rng.random_sample(n_layers)
    costs = [(2 * density * size).astype(int).tolist() for size in sizes]
    errors = [
        (scale * np.exp(-rate * density * (1 + 0.02 * rng.random_sample(30)))).tolist()
        for rate, scale in zip(rates, scales, strict=True)
    ]
    return costs, errors


def test_a_network_is_split_with_a_proof_and_no_byte_too_many():
    costs, errors = curves(100)
    budget = 0.4 * sum(layer[-1] for layer in costs)
    found = select(costs, errors, budget)
    assert found.cost <= budget
    assert found.lower_bound >= found.error * (1 - 1e-9)
    uniform = max(k for k in range(30) if sum(layer[k] for layer in costs) <= budget)
    assert found.error < 0.9 * sum(layer[uniform] for layer in errors)


def test_an_ample_budget_takes_the_best_of_each_layer():
    costs, errors = curves(10)
    found = select(costs, errors, 1e12)
    assert found.error == math.fsum(map(min, errors))


@pytest.mark.parametrize(
    ("costs", "errors", "budget", "message"),
    [
        ([[1]], [[1], [2]], 3, "equally many layers"),
        ([[1, 2]], [[1]], 3, "the same length, at least 1, for layer 0"),
        ([[]], [[]], 3, "the same length, at least 1, for layer 0"),
        ([[1], [-1]], [[1], [1]], 3, "not negative, got layer 1"),
        ([[1]], [[math.nan]], 3, "finite"),
        ([[math.inf]], [[1]], 3, "finite"),
        ([[1]], [[1]], 0, "budget must be a positive number"),
        ([[1]], [[1]], math.nan, "budget must be a positive number"),
        ([[2, 3], [4]], [[1, 0], [1]], 5, "budget=5 must be at least 6"),
    ],
)
def test_what_makes_no_sense_is_refused(costs, errors, budget, message):
    with pytest.raises(ValueError, match=message):
        select(costs, errors, budget)
