"""Pruners: what they keep, what they store, and how far outputs move."""

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact import (
    ADMMPruner,
    MagnitudePruner,
    OBSPruner,
    SparseGPT,
    WandaPruner,
    backend,
    metrics,
)
from matfact.calibration import InputStatistics
from matfact.constraints import (
    BlockSparsity,
    ColumnSparsity,
    FixedSupport,
    GlobalSparsity,
    NMSparsity,
    RowSparsity,
)
from matfact.solvers import obs

PRUNERS = [MagnitudePruner, WandaPruner, ADMMPruner, SparseGPT]
CALIBRATED = [WandaPruner, ADMMPruner, SparseGPT, OBSPruner]
#: Sets that a row can be pruned to without regard to others.
BY_ROWS = [GlobalSparsity(180), RowSparsity(9), NMSparsity(2, 4), NMSparsity(3, 5)]
SETS = [
    GlobalSparsity(180),
    RowSparsity(9),
    ColumnSparsity(10),
    NMSparsity(2, 4),
    BlockSparsity(4, (4, 6)),
    FixedSupport(np.tri(20, 36)),
]


def correlated(rng, samples, features):
    mixing = np.eye(features) + 0.5 * rng.standard_normal((features, features)) / features**0.5
    return rng.standard_normal((samples, features)) @ mixing * rng.uniform(0.1, 3, features)


def fit(pruner, W, X, **parameters):
    model = pruner(**parameters)
    return model.fit(W) if pruner is MagnitudePruner else model.fit(W, calibration=X)


def refit(W, X, support):
    """Least squares of the outputs on the inputs that every row keeps."""
    refitted = np.zeros_like(W)
    for i, kept in enumerate(support):
        refitted[i, kept] = np.linalg.lstsq(X[:, kept], X @ W[i], rcond=None)[0]
    return refitted


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("constraint", SETS, ids=repr)
def test_constraints_hold(pruner, constraint, rng):
    W = rng.standard_normal((20, 36))
    model = fit(pruner, W, correlated(rng, 100, 36), constraint=constraint)
    pruned = model.operator_.toarray()
    np.testing.assert_array_equal(constraint.project(pruned), pruned)
    assert len(model.factors_) == 1


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(("name", "axis"), [("row_sparsity", 1), ("column_sparsity", 0)])
def test_density_is_shared_alike_by_rows_or_columns(pruner, name, axis, rng):
    W = rng.standard_normal((20, 36))
    model = fit(pruner, W, correlated(rng, 100, 36), density=0.5, constraint=name)
    counts = np.count_nonzero(model.operator_.toarray(), axis=axis)
    assert set(counts) == {W.shape[axis] // 2}


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    samples=st.integers(1, 30),
    density=st.floats(0.2, 1.0),
    dead=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_budgets_and_odd_inputs(rows, columns, samples, density, dead, seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns))
    X = rng.standard_normal((samples, columns)) * 10.0 ** rng.integers(-3, 4, columns)
    X[:, :dead] = 0
    for pruner in CALIBRATED:
        least = rows if pruner is WandaPruner else 1
        if int(round(density * W.size, 9)) < least:
            continue
        model = fit(pruner, W, X, density=density)
        assert model.nnz_ <= density * W.size * (1 + 1e-9)
        assert np.all(np.isfinite(model.operator_.toarray()))
        if density == 1.0:
            np.testing.assert_allclose(model.operator_.toarray(), W, rtol=1e-12)


@pytest.mark.parametrize("constraint", SETS, ids=repr)
def test_admm_is_never_worse_than_other_supports_refit(constraint, rng):
    W, X = rng.standard_normal((20, 36)), correlated(rng, 100, 36)
    statistics = InputStatistics().update(X)
    others = [
        refit(W, X, fit(pruner, W, X, constraint=constraint).operator_.toarray() != 0)
        for pruner in (MagnitudePruner, WandaPruner)
    ]
    model = ADMMPruner(constraint=constraint, damping=0).fit(W, calibration=statistics)
    best = min(metrics.layer_error(W, other, statistics.gram) for other in others)
    assert model.layer_err_ <= best * 1.001
    if not isinstance(constraint, FixedSupport):
        assert model.layer_err_ < 0.98 * best


def test_values_on_a_fixed_support_are_least_squares(rng):
    W, X = rng.standard_normal((12, 16)), correlated(rng, 60, 16)
    support = rng.random((12, 16)) < 0.5
    model = ADMMPruner(constraint=FixedSupport(support), damping=0).fit(W, calibration=X)
    np.testing.assert_allclose(model.operator_.toarray(), refit(W, X, support), atol=1e-3)


def test_wanda_scores_are_magnitude_times_norm(rng):
    W, X = rng.standard_normal((10, 16)), correlated(rng, 60, 16)
    scores = np.abs(W) * np.linalg.norm(X, axis=0)
    kept = scores >= np.sort(scores, axis=1)[:, [-4]]
    model = WandaPruner(density=0.25).fit(W, calibration=X)
    np.testing.assert_array_equal(model.operator_.toarray(), np.where(kept, W, 0))


@pytest.mark.parametrize("constraint", ["global_sparsity", "row_sparsity", NMSparsity(1, 4)])
def test_without_calibration_all_prune_by_magnitude(constraint, rng):
    W = rng.standard_normal((12, 16))
    expected, *others = (p(constraint=constraint).fit(W).operator_.toarray() for p in PRUNERS)
    for other in others:
        np.testing.assert_array_equal(other, expected)


@pytest.mark.parametrize("pruner", CALIBRATED)
def test_weights_of_dead_inputs_go_first(pruner, rng):
    W, X = rng.standard_normal((12, 16)), correlated(rng, 60, 16)
    X[:, [2, 7]] = 0
    model = pruner(constraint=RowSparsity(14)).fit(W, calibration=X)
    assert not model.operator_.toarray()[:, [2, 7]].any()
    assert model.layer_err_ < 1e-6


@pytest.mark.parametrize("pruner", CALIBRATED)
def test_inputs_that_are_all_zero_prune_by_magnitude(pruner, rng):
    W = rng.standard_normal((12, 16))
    blind = pruner().fit(W).operator_.toarray()
    model = pruner().fit(W, calibration=np.zeros((5, 16)))
    np.testing.assert_allclose(model.operator_.toarray(), blind, rtol=1e-6)


def test_damping_keeps_values_near_the_given_ones(rng):
    W, X = rng.standard_normal((12, 32)), correlated(rng, 20, 32)
    free, damped = (ADMMPruner(damping=d).fit(W, calibration=X) for d in (0, 1.0))
    assert free.layer_err_ < damped.layer_err_
    assert damped.reconstruction_err_ < free.reconstruction_err_


def test_damping_by_default_helps_on_samples_held_out(rng):
    W = rng.standard_normal((32, 48))
    X = correlated(rng, 1080, 48)
    held_out = InputStatistics().update(X[80:]).gram
    errors = [
        metrics.layer_error(
            W, ADMMPruner(0.5, damping=d).fit(W, calibration=X[:80]).operator_.toarray(), held_out
        )
        for d in ("auto", 0)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_objective_has_an_entry_for_every_step(rng):
    W, X = rng.standard_normal((12, 16)), correlated(rng, 60, 16)
    model = ADMMPruner(max_iter=7, damping=0).fit(W, calibration=X)
    assert len(model.history_["objective"]) == model.n_iter_ == 7
    assert model.layer_err_**2 <= model.history_["objective"][-1]


@pytest.mark.parametrize("pruner", CALIBRATED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_array_libraries_agree(pruner, dtype, library, rng):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip("torch")
    W, X = rng.standard_normal((12, 16)).astype(dtype), correlated(rng, 60, 16).astype(dtype)
    expected = fit(pruner, W, X, constraint=NMSparsity(2, 4))
    model = fit(pruner, xp.asarray(W), xp.asarray(X), constraint=NMSparsity(2, 4))
    assert model.factors_[0].dtype == getattr(xp, dtype)
    assert model.layer_err_ == pytest.approx(expected.layer_err_, rel=1e-3)
    assert backend.to_numpy(model.operator_.toarray()).shape == W.shape


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 0.5, "constraint": NMSparsity(2, 4)}, "density must be None"),
        ({"constraint": "toeplitz"}, "constraint must be a sparsity or a support"),
        ({"constraint": "n_m_sparsity"}, "constraint='n_m_sparsity'"),
        ({"constraint": "sparse"}, "constraint='sparse'"),
        ({"constraint": 0.5}, "constraint"),
        ({"constraint": FixedSupport(np.eye(3))}, "constraint: support_mask"),
        ({"density": 0.05, "constraint": "row_sparsity"}, "density=0.05 allows 1"),
    ],
)
def test_bad_parameters_are_named(pruner, parameters, message):
    with pytest.raises(ValueError, match=message):
        pruner(**parameters).fit(np.ones((4, 6)))


@pytest.mark.parametrize("damping", [-1.0, "much"])
def test_bad_damping_is_named(damping):
    with pytest.raises(ValueError, match="damping"):
        ADMMPruner(damping=damping).fit(np.ones((4, 6)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("damping", [-1.0, "much"])
@pytest.mark.parametrize("pruner", [SparseGPT, OBSPruner])
def test_bad_relative_damping_is_named(pruner, damping):
    with pytest.raises(ValueError, match="damping"):
        pruner(damping=damping).fit(np.ones((4, 6)))


def removed_one_by_one(W, X, n_kept):
    """Exact Optimal Brain Compression, each removal by trying all that are left."""
    gram, support = X.T @ X, np.ones(W.shape, bool)
    while support.sum() > n_kept:
        best = (np.inf, (0, 0))
        for i, j in np.argwhere(support):
            tried = support[i].copy()
            tried[j] = False
            lost = W[i] - refit(W[[i]], X, tried[None])[0]
            kept = W[i] - refit(W[[i]], X, support[[i]])[0]
            best = min(best, (lost @ gram @ lost - kept @ gram @ kept, (i, j)))
        support[best[1]] = False
    return refit(W, X, support)


def test_obs_removes_what_costs_least_every_time(rng):
    W, X = rng.standard_normal((3, 6)), correlated(rng, 40, 6)
    model = OBSPruner(constraint=GlobalSparsity(9), damping=0).fit(W, calibration=X)
    np.testing.assert_allclose(model.operator_.toarray(), removed_one_by_one(W, X, 9), atol=1e-6)


@pytest.mark.parametrize("constraint", BY_ROWS, ids=repr)
def test_obs_is_ahead_of_other_supports_refit(constraint, rng):
    W, X = rng.standard_normal((20, 36)), correlated(rng, 100, 36)
    gram = InputStatistics().update(X).gram
    model = OBSPruner(constraint=constraint, damping=0).fit(W, calibration=X)
    pruned = model.operator_.toarray()
    np.testing.assert_array_equal(constraint.project(pruned), pruned)
    np.testing.assert_allclose(pruned, refit(W, X, pruned != 0), atol=1e-8)
    for pruner in (MagnitudePruner, WandaPruner, SparseGPT):
        other = fit(pruner, W, X, constraint=constraint).operator_.toarray()
        assert model.layer_err_ < 1.02 * metrics.layer_error(W, refit(W, X, other != 0), gram)


@pytest.mark.parametrize("constraint", ["global_sparsity", NMSparsity(1, 3)], ids=repr)
def test_obs_may_update_the_inverse_after_any_number_of_removals(constraint, rng, monkeypatch):
    W, X = rng.standard_normal((4, 60)), correlated(rng, 300, 60)
    found = []
    for steps in (1, 7, 100):
        monkeypatch.setattr(obs, "STEPS", steps)
        found.append(OBSPruner(constraint=constraint).fit(W, calibration=X).operator_.toarray())
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-9)


@pytest.mark.parametrize("constraint", [ColumnSparsity(3), BlockSparsity(2), "column_sparsity"])
def test_obs_refuses_sets_of_more_than_a_row(constraint):
    with pytest.raises(ValueError, match="constraint must be a global, row or N:M sparsity"):
        OBSPruner(constraint=constraint).fit(np.ones((8, 8)), calibration=np.eye(8))


def test_sparsegpt_is_between_wanda_and_obs(rng):
    W, X = rng.standard_normal((32, 160)), correlated(rng, 500, 160)
    wanda, sparsegpt, exact = (
        pruner(0.4).fit(W, calibration=X).layer_err_
        for pruner in (WandaPruner, SparseGPT, OBSPruner)
    )
    assert exact < sparsegpt < 0.95 * wanda


def test_sparsegpt_shares_values_by_panels_of_inputs(rng):
    W, X = rng.standard_normal((32, 256)), correlated(rng, 500, 256)
    X[:, :128] *= 10
    kept = SparseGPT(0.25).fit(W, calibration=X).operator_.toarray() != 0
    assert kept[:, :128].mean() == kept[:, 128:].mean() == 0.25
