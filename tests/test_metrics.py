"""Errors and budgets."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matfact import metrics


@given(st.floats(1e-6, 1.0), st.integers(1, 200), st.integers(1, 200))
def test_budget_is_the_most_that_the_density_allows(density, rows, columns):
    size = rows * columns
    try:
        budget = metrics.stored_value_budget(density, (rows, columns))
    except ValueError:
        assert density < 1 / size
        return
    assert budget / size <= density
    assert (budget + 1) / size > density


def test_budget_without_a_density_is_a_quarter_or_the_least_possible():
    assert metrics.stored_value_budget(None, (10, 10)) == 25
    assert metrics.stored_value_budget(None, (10, 10), minimum=40) == 40
    assert metrics.stored_value_budget(0.29, (10, 10)) == 29


def test_budget_below_the_minimum_names_the_density_needed():
    with pytest.raises(ValueError, match=r"at least 40 \(density ≥ 0\.4\)"):
        metrics.stored_value_budget(0.3, (10, 10), minimum=40)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_relative_error_at_any_scale(scale):
    W = np.array([[3.0, 4.0], [0.0, 0.0]]) * scale
    W_hat = np.array([[3.0, 0.0], [0.0, 0.0]]) * scale
    assert metrics.relative_error(W, W_hat) == pytest.approx(0.8)


def test_errors_of_zero_matrices():
    zero, one = np.zeros((2, 2)), np.ones((2, 2))
    assert metrics.relative_error(zero, zero) == 0.0
    assert metrics.relative_error(zero, one) == math.inf
    assert metrics.normalized_error(zero, 0.0, 1) == 0.0


def test_magnitude_error_drops_the_smallest_entries():
    W = np.array([[3.0, -4.0], [1.0, 2.0]])
    assert metrics.magnitude_error(W, 2) == pytest.approx(math.sqrt(5 / 30))
    assert metrics.magnitude_error(W, 4) == 0.0
    assert metrics.normalized_error(W, 0.5, 4) == math.inf
