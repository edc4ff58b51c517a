"""Values refitted to a layer's inputs: descent, supports, optimality, degenerate inputs."""

import numpy as np
import pytest

from matfact import (
    BlockSVD,
    ButterflyFit,
    DoubleSparseFactorizer,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    RoundToNearest,
)
from matfact.metrics import layer_error
from matfact.operators import FactorProduct
from matfact.solvers.finalize import DAMPING, finalize, input_scale, reselect, scaled_columns

FACTORIZERS = {
    "magnitude": MagnitudePruner(density=0.4),
    "dsf": DoubleSparseFactorizer(density=0.4, max_iter=10),
    "monarch": MonarchProjector(n_blocks=5, density=0.4),
    "butterfly": ButterflyFit(chain="square_dyadic"),
    "blocks": BlockSVD(density=0.4, blocking=(2, 3)),
    "lowrank": LowRank(density=0.4),
}


@pytest.fixture(params=FACTORIZERS)
def product(request, W):
    return FACTORIZERS[request.param].fit(W).operator_


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def W():
    return np.random.default_rng(1).standard_normal((33, 40))  # a padded size for structures


@pytest.fixture
def X(rng):
    return rng.standard_normal((300, 10)) @ rng.standard_normal((10, 40)) * rng.random(40)


def test_columns_are_scaled_without_a_change_of_supports(product, rng):
    scale = rng.random(40) + 0.5
    scaled = scaled_columns(product, scale)
    np.testing.assert_allclose(scaled.toarray(), product.toarray() * scale, rtol=1e-10, atol=1e-12)
    for before, after in zip(product, scaled, strict=True):
        np.testing.assert_array_equal(before.locations, after.locations)


def test_output_error_falls_and_supports_stay(product, W, X):
    gram = X.T @ X
    final = finalize(product, W, gram / len(X))
    before, after = (layer_error(W, p.toarray(), gram) for p in (product, final))
    assert after < 0.9 * before
    for old, new in zip(product, final, strict=True):
        np.testing.assert_array_equal(old.locations, new.locations)


def test_a_single_factor_reaches_the_least_squares_solution_of_each_row(W, rng):
    X = rng.standard_normal((100, 40))
    moment = X.T @ X / len(X)
    product = MagnitudePruner(density=0.3).fit(W).operator_
    found = finalize(product, W, moment, n_steps=200).toarray()
    damped = moment / np.mean(np.diag(moment)) + DAMPING * np.eye(40)
    for row, target, kept in zip(found, W, product.toarray() != 0, strict=True):
        expected = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ target)
        np.testing.assert_allclose(row[kept], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dead", [slice(0, 40), slice(3, 9)])
def test_dead_inputs_leave_everything_finite(product, W, X, dead):
    X[:, dead] = 0.0
    moment = X.T @ X / len(X)
    assert (input_scale(moment) > 0).all()
    assert np.isfinite(finalize(product, W, moment).toarray()).all()


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_other_libraries_agree_with_numpy(library, W, X):
    xp = pytest.importorskip(library)
    product = DoubleSparseFactorizer(density=0.4, max_iter=5).fit(xp.asarray(W)).operator_
    moment = X.T @ X / len(X)
    found = finalize(product, xp.asarray(W), xp.asarray(moment)).toarray()
    plain = FactorProduct([f.with_values(np.asarray(f.values)) for f in product])
    np.testing.assert_allclose(np.asarray(found), finalize(plain, W, moment).toarray(), atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_other_entries_of_the_first_factor_lower_the_error(transposed, rng):
    X = rng.standard_normal((400, 40)) @ rng.standard_normal((40, 40))
    W = rng.standard_normal((40, 24)) @ rng.standard_normal((24, 40)) + rng.standard_normal(
        (40, 40)
    )
    W = W[:30] if transposed else np.vstack([W, W[:, ::-1]])
    gram = X.T @ X
    values = finalize(DoubleSparseFactorizer(density=0.4).fit(W).operator_, W, gram / len(X))
    found = reselect(values, W, gram / len(X))
    before, after = (layer_error(W, p.toarray(), gram) for p in (values, found))
    assert after < 0.98 * before
    assert found.nnz <= values.nnz
    np.testing.assert_array_equal(found[1].locations, values[1].locations)


def test_a_product_that_stores_nothing_is_left_alone():
    W = np.zeros((5, 6))
    product = DoubleSparseFactorizer().fit(W).operator_
    assert not reselect(product, W, np.eye(6)).toarray().any()


def test_columns_of_codes_are_not_scaled():
    quantized = RoundToNearest().fit(np.eye(6) + 0.1).operator_
    with pytest.raises(TypeError, match="cannot be scaled: its values are codes"):
        scaled_columns(quantized, np.ones(6))
