"""Properties of every factorizer for every matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.base import clone

from tests.conformance.estimators import FACTORIZERS

matrices = hnp.arrays(
    st.sampled_from([np.float64, np.float32]),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
    elements=st.floats(-8, 8, width=16),
)
densities = st.one_of(st.none(), st.floats(0.02, 1.0))
several = settings(deadline=None, max_examples=20)


def fit_or_refuse(factorizer, W, density):
    """Fit, or return None where the density is below what the structure needs."""
    model = clone(factorizer).set_params(density=density)
    try:
        return model.fit(W)
    except ValueError as error:
        if density is None or "stored values" not in str(error):
            raise
        return None


@pytest.mark.parametrize("name", FACTORIZERS)
@several
@given(W=matrices, density=densities)
def test_budget_error_and_application(name, W, density):
    model = fit_or_refuse(FACTORIZERS[name], W, density)
    if model is None:
        return
    if density is not None:
        assert model.density_ <= density
    eps = np.finfo(W.dtype).eps
    # Never worse than the zero matrix, up to the rounding of what is returned.
    assert model.reconstruction_err_ <= 1 + 1e2 * eps
    dense = model.operator_.toarray()
    assert dense.dtype == W.dtype
    assert dense.shape == W.shape
    X = np.random.default_rng(0).standard_normal((W.shape[1], 3)).astype(W.dtype)
    scale = np.linalg.norm(dense) * np.linalg.norm(X) + np.finfo(W.dtype).tiny
    assert np.linalg.norm(model.operator_ @ X - dense @ X) <= 1e3 * eps * scale
    assert np.linalg.norm(model.operator_.T @ W - dense.T @ W) <= 1e4 * eps * (
        np.linalg.norm(dense) * np.linalg.norm(W) + np.finfo(W.dtype).tiny
    )


@pytest.mark.parametrize("name", FACTORIZERS)
@several
@given(W=matrices, exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result_exactly(name, W, exponent):
    model = clone(FACTORIZERS[name]).fit(W)
    scaled = clone(FACTORIZERS[name]).fit(W * W.dtype.type(2.0**exponent))
    assert scaled.reconstruction_err_ == pytest.approx(model.reconstruction_err_, rel=1e-6)
    np.testing.assert_allclose(
        scaled.operator_.toarray() / 2.0**exponent,
        model.operator_.toarray(),
        rtol=1e-6,
        atol=1e-30,  # subnormal numbers are rounded
    )


@pytest.mark.parametrize("name", FACTORIZERS)
@several
@given(W=matrices)
def test_fitting_twice_gives_the_same_result(name, W):
    first, second = (clone(FACTORIZERS[name]).fit(W) for _ in range(2))
    np.testing.assert_array_equal(first.operator_.toarray(), second.operator_.toarray())
    assert first.history_["objective"] == second.history_["objective"]


@pytest.mark.parametrize("name", ["dsf", "lowrank", "magnitude"])
@pytest.mark.parametrize("shape", [(20, 32), (32, 20)])
def test_symmetric_methods_factorize_the_transpose_alike(name, shape):
    W = np.random.default_rng(0).standard_normal(shape)
    straight, turned = (clone(FACTORIZERS[name]).fit(A) for A in (W, W.T))
    assert turned.reconstruction_err_ == pytest.approx(straight.reconstruction_err_, rel=1e-6)


@pytest.mark.parametrize("name", FACTORIZERS)
def test_more_values_give_no_larger_error(name):
    W = np.random.default_rng(0).standard_normal((32, 32))
    errors = [
        clone(FACTORIZERS[name]).set_params(density=d).fit(W).reconstruction_err_
        for d in (0.3, 0.5, 0.9)
    ]
    assert errors == sorted(errors, reverse=True)
