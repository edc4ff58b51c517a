"""PALM on many layers: descent, exact cases, warm starts, every array library."""

import array_api_strict
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact import backend
from matfact.constraints import (
    CONSTRAINTS,
    BlockDiagonal,
    BlockSparsity,
    ColumnSparsity,
    FixedSupport,
    GlobalSparsity,
    MaxRank,
    NMSparsity,
    RowColumnSparsity,
    RowSparsity,
    UnitNormColumns,
)
from matfact.solvers import palm
from matfact.solvers.hierarchical import hierarchical_palm4msa
from matfact.solvers.palm import _paths_cancel, identity_start, palm4msa

PARAMETERS = {
    "block_diagonal": BlockDiagonal(3),
    "block_sparsity": BlockSparsity(4, (3, 3)),
    "column_sparsity": ColumnSparsity(3),
    "fixed_support": FixedSupport(np.tri(9, k=2)),
    "global_sparsity": GlobalSparsity(30),
    "max_rank": MaxRank(2),
    "n_m_sparsity": NMSparsity(1, 3),
    "row_column_sparsity": RowColumnSparsity(2),
    "row_sparsity": RowSparsity(3),
}
EVERY = [PARAMETERS[name] if name in PARAMETERS else CONSTRAINTS[name]() for name in CONSTRAINTS]


def butterfly_supports(n):
    """The supports whose product is dense, the factor of the longest stride first."""
    halvings = range(n.bit_length() - 1)
    return [np.kron(np.kron(np.eye(1 << i), np.ones((2, 2))), np.eye(n >> i + 1)) for i in halvings]


def residual_error(W, factors, scale=1.0):
    return np.linalg.norm(W - scale * np.linalg.multi_dot([*factors, np.eye(W.shape[1])]))


def solve(W, constraints, **options):
    start, backward = identity_start(W, constraints)
    return palm4msa(W, start, constraints, backward=backward, **options)


@pytest.mark.parametrize("first", EVERY, ids=repr)
def test_every_constraint_holds_and_the_result_is_no_worse_than_the_start(first, rng):
    W = rng.standard_normal((9, 9))
    constraints = [first, GlobalSparsity(50)]
    start, backward = identity_start(W, constraints)
    projected = [c.project(f) for c, f in zip(constraints, start, strict=True)]
    factors, scale, _ = palm4msa(W, start, constraints, backward=backward, max_iter=30)
    for constraint, factor in zip(constraints, factors, strict=True):
        if isinstance(constraint, RowColumnSparsity):  # its support depends on the values
            assert np.count_nonzero(factor) <= constraint.nnz(factor.shape)
        else:
            np.testing.assert_allclose(constraint.project(factor), factor, atol=1e-12)
    assert residual_error(W, factors, scale) <= residual_error(W, projected) * (1 + 1e-12)


# The union rule of rows and columns is no nearest point, so that descent is not promised.
@pytest.mark.parametrize(
    "first", [c for c in EVERY if not isinstance(c, RowColumnSparsity)], ids=repr
)
def test_unstretched_steps_descend(first, rng):
    objectives = []
    constraints = [first, GlobalSparsity(50)]
    solve(
        rng.standard_normal((9, 9)),
        constraints,
        relaxation=1.0,
        max_iter=40,
        tol=0.0,
        callback=lambda _, objective: objectives.append(objective),
    )
    objectives = np.asarray(objectives)
    # Sets of one norm are scaled to fit after each sweep, which descends too.
    assert np.all(np.diff(objectives) <= 1e-12 * objectives[0])


def test_longer_first_steps_find_better_supports(rng):
    W = rng.standard_normal((64, 64))
    constraints = [GlobalSparsity(400), GlobalSparsity(624)]
    short, long = (solve(W, constraints, relaxation=r)[0] for r in (1.0, palm.RELAXATION))
    assert residual_error(W, long) < 0.95 * residual_error(W, short)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    n_factors=st.integers(1, 4),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["normal", "zero", "ones", "rank one"]),
)
@settings(deadline=None, max_examples=25)
def test_the_result_is_finite_and_never_worse_than_the_start(rows, columns, n_factors, seed, kind):
    rng = np.random.default_rng(seed)
    W = {
        "normal": rng.standard_normal((rows, columns)),
        "zero": np.zeros((rows, columns)),
        "ones": np.ones((rows, columns)),
        "rank one": np.outer(rng.standard_normal(rows), rng.standard_normal(columns)),
    }[kind]
    constraints = [GlobalSparsity(max(rows, columns))] * n_factors
    start, _ = identity_start(W, constraints)
    factors, _, _ = solve(W, constraints, max_iter=15)
    assert residual_error(W, factors) <= residual_error(W, start) * (1 + 1e-12) + 1e-12


def test_steps_descend_where_supports_are_given(rng):
    objectives = []
    supports = [FixedSupport(rng.random((20, 20)) < 0.3) for _ in range(2)]
    start = [support.project(rng.standard_normal((20, 20))) for support in supports]
    palm4msa(
        rng.standard_normal((20, 20)),
        start,
        supports,
        max_iter=30,
        callback=lambda _, objective: objectives.append(objective),
    )
    assert np.all(np.diff(objectives) <= 0)


def test_supports_that_stay_at_first_are_still_searched():
    W = scipy.linalg.hadamard(64) / 8.0
    factors, _, _ = solve(W, [GlobalSparsity(1024)] * 2)
    assert residual_error(W, factors) < 0.5 * np.linalg.norm(W)


def test_objective_is_that_of_the_returned_factors(rng):
    W = rng.standard_normal((20, 30))
    objectives = []
    factors, _, n_iter = solve(
        W,
        [GlobalSparsity(100), GlobalSparsity(100)],
        callback=lambda _, objective: objectives.append(objective),
    )
    assert len(objectives) == n_iter
    assert residual_error(W, factors) ** 2 == pytest.approx(min(objectives), rel=1e-10)


def test_facing_columns_and_rows_have_equal_norms(rng):
    W = rng.standard_normal((20, 30))
    (left, right), _, _ = solve(W, [GlobalSparsity(100), GlobalSparsity(100)])
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))


def test_long_steps_do_not_part_the_norms_of_factors(rng):
    W = rng.standard_normal((32, 288)).astype(np.float32)
    sets = [RowColumnSparsity(2)] * 2
    with np.errstate(all="raise", under="ignore"):
        factors, _, _ = solve(W, sets)
    assert all(np.isfinite(factor).all() for factor in factors)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_true_where_large_entries_cancel(seed):
    W = np.random.RandomState(seed).standard_normal((10, 256)).astype(np.float32)
    history = []
    factors, scale, _ = solve(
        W, [RowColumnSparsity(2)] * 3, callback=lambda _, objective: history.append(objective)
    )
    wide = [factor.astype(np.float64) for factor in factors]
    assert residual_error(W, wide, scale) < np.linalg.norm(W)
    assert np.isclose(history, residual_error(W, wide, scale) ** 2, rtol=1e-3).any()


def test_one_factor_is_the_projection(rng):
    W = rng.standard_normal((6, 8))
    (factor,), _, n_iter = solve(W, [GlobalSparsity(10)])
    np.testing.assert_array_equal(factor, GlobalSparsity(10).project(W))
    assert n_iter == 1


def test_low_rank_and_sparse_layers_recover_a_low_rank_matrix(rng):
    W = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 12))
    factors, _, _ = solve(W, [MaxRank(2), GlobalSparsity(144)], max_iter=300)
    assert residual_error(W, factors) < 1e-8 * np.linalg.norm(W)


def test_unit_norm_columns_come_with_a_scale(rng):
    dictionary = rng.standard_normal((10, 10))
    W = 3 * dictionary / np.linalg.norm(dictionary, axis=0)
    (atoms, code), scale, _ = solve(W, [UnitNormColumns(), UnitNormColumns()], max_iter=300)
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=0), 1)
    np.testing.assert_allclose(np.linalg.norm(code, axis=0), 1)
    assert residual_error(W, [atoms, code], scale) < 0.01 * np.linalg.norm(W)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transform", ["hadamard", "dft"])
def test_hierarchical_recovers_fast_transforms(side, transform):
    n = 64
    if transform == "hadamard":
        W = scipy.linalg.hadamard(n) / np.sqrt(n)
    else:
        reversal = np.arange(n).reshape((2,) * 6).T.ravel()
        W = scipy.linalg.dft(n, scale="sqrtn")[:, reversal]
    supports = butterfly_supports(n)
    residuals = [
        np.linalg.multi_dot([*part, np.eye(n)]) for part in _residual_parts(supports, side)
    ]
    factors, _, _ = hierarchical_palm4msa(
        W, [FixedSupport(s) for s in supports], [FixedSupport(s) for s in residuals], side=side
    )
    assert residual_error(W, factors) < 1e-13 * np.linalg.norm(W)


def _residual_parts(supports, side):
    indices = range(len(supports) - 2)
    return [supports[: i + 2] if side == "right" else supports[i + 1 :] for i in indices]


def test_one_split_is_a_joint_fit_with_its_scale(rng):
    W = 5 * rng.standard_normal((8, 8))
    sets = [UnitNormColumns(), UnitNormColumns()]
    joint, joint_scale, _ = solve(W, sets, max_iter=20)
    split, scale, _ = hierarchical_palm4msa(W, sets, [], side="left", max_iter=20)
    assert scale == joint_scale != 1.0
    for one, other in zip(split, joint, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_start_far_from_the_matrix_ends_no_worse_than_zero(sign, rng):
    W = rng.standard_normal((9, 9))
    factors, _, _ = palm4msa(W, [np.eye(9), sign * 1e6 * W], [GlobalSparsity(20)] * 2, max_iter=5)
    assert residual_error(W, factors) < np.linalg.norm(W)


def test_a_stopping_callback_reaches_the_caller(rng):
    def stop(iteration, objective):
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(rng.standard_normal((9, 9)), [GlobalSparsity(30)] * 2, callback=stop)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_array_libraries_agree(library, dtype, rng):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip("torch")
    W = rng.standard_normal((12, 8))
    W = (W + 1j * rng.standard_normal((12, 8)) if "complex" in dtype else W).astype(dtype)
    # On fixed supports rounding cannot grow: no support changes.
    constraints = [FixedSupport(np.tri(12, 8)), FixedSupport(np.tri(8).T)]
    expected, _, _ = solve(W, constraints, max_iter=10)
    factors, _, _ = solve(xp.asarray(W), constraints, max_iter=10)
    for factor, reference in zip(factors, expected, strict=True):
        assert factor.dtype == getattr(xp, dtype)
        np.testing.assert_allclose(
            backend.to_numpy(factor), reference, atol=1e3 * np.finfo(dtype).eps
        )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_large_entries_that_cancel_are_told_from_large_ones_that_meet_zeros():
    right = np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)
    shear = np.array([[1e4, -1e4], [1e4, -9.999e3]], np.float32)
    unshear = np.linalg.inv(shear.astype(float)).astype(np.float32)
    assert _paths_cancel([shear, unshear, right], right)
    meets_zeros = np.array([[1.0, 0.0, 1e8], [0.0, 1.0, 1e8]], np.float32)
    assert not _paths_cancel([meets_zeros, np.vstack([right, [[0, 0]]])], right)
