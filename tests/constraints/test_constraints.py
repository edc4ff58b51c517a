"""Every constraint set: nearest point, idempotence, budget, on every array library."""

import itertools

import array_api_strict
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from matfact import backend
from matfact.constraints import (
    CONSTRAINTS,
    BlockDiagonal,
    BlockSparsity,
    Circulant,
    ColumnSparsity,
    Diagonal,
    FixedSupport,
    GlobalSparsity,
    Hankel,
    MaxRank,
    NMSparsity,
    NonNegative,
    RowColumnSparsity,
    RowSparsity,
    Toeplitz,
    Triangular,
    UnitNormColumns,
    get_constraint,
    transposed,
)

SHAPE = (4, 4)
CHECKERBOARD = np.indices(SHAPE).sum(axis=0) % 2 == 0
SPARSITY = [
    GlobalSparsity(5),
    RowSparsity(2),
    ColumnSparsity(3),
    RowColumnSparsity(1),
    BlockSparsity(2, (2, 2)),
    NMSparsity(1, 3),
    NMSparsity(2, 4),
    NMSparsity(1, 8),
]
SUPPORT = [
    FixedSupport(CHECKERBOARD),
    BlockDiagonal(2),
    BlockDiagonal(3),
    Triangular(),
    Triangular(upper=True),
    Diagonal(),
]
SHARED = [Circulant(), Toeplitz(), Hankel()]
OTHERS = [MaxRank(2), NonNegative(), UnitNormColumns()]
ALL = SPARSITY + SUPPORT + SHARED + OTHERS
MATRICES = hnp.arrays(np.float64, SHAPE, elements=st.integers(-3, 3).map(float))


def each(constraints):
    return pytest.mark.parametrize("constraint", constraints, ids=repr)


def atol(dtype=np.float64):
    return 100 * np.finfo(dtype).eps


@each(ALL)
@given(array=MATRICES)
@settings(deadline=None, max_examples=15)
def test_projection_is_idempotent(constraint, array):
    once = constraint.project(array)
    np.testing.assert_allclose(constraint.project(once), once, atol=10 * atol())


@each(SPARSITY + SUPPORT)
@given(array=MATRICES)
@settings(deadline=None, max_examples=15)
def test_projection_keeps_no_more_than_its_budget_under_ties(constraint, array):
    assert np.count_nonzero(constraint.project(array)) <= constraint.nnz(SHAPE)


@pytest.mark.parametrize("value", [0.0, 1.0])
@each([c for c in SPARSITY if not isinstance(c, RowColumnSparsity)])
def test_sparsity_keeps_exactly_its_budget_of_a_constant_matrix(constraint, value):
    assert np.count_nonzero(constraint.support(np.full(SHAPE, value))) == constraint.nnz(SHAPE)


def test_row_column_budget_is_reached_by_an_arrow():
    arrow = np.zeros((5, 3))
    arrow[0], arrow[:, 0] = 1.0, 1.0
    constraint = RowColumnSparsity(1)
    assert np.count_nonzero(constraint.project(arrow)) == constraint.nnz(arrow.shape) == 7


def test_row_column_keeps_the_largest_of_every_row_and_column(rng):
    array = rng.standard_normal((6, 5))
    magnitudes, kept = np.abs(array), RowColumnSparsity(2).support(array)
    rows = magnitudes >= np.sort(magnitudes, axis=1)[:, -2:-1]
    columns = magnitudes >= np.sort(magnitudes, axis=0)[-2:-1]
    np.testing.assert_array_equal(kept, rows | columns)


@each([GlobalSparsity(3), RowSparsity(1), ColumnSparsity(1), NMSparsity(1, 2)])
def test_sparse_projection_is_nearest_among_all_supports(constraint, rng):
    array = rng.standard_normal((2, 3))
    supports = (
        np.reshape(bits, array.shape) for bits in itertools.product([False, True], repeat=6)
    )
    # A support is allowed when the indicator of it is left as it is.
    allowed = [s for s in supports if np.array_equal(constraint.project(s * 1.0), s * 1.0)]
    best = min(np.linalg.norm(array - array * s) for s in allowed)
    assert np.linalg.norm(array - constraint.project(array)) == pytest.approx(best)


@each(SUPPORT + SHARED)
def test_linear_sets_are_projected_onto_orthogonally(constraint, rng):
    basis = np.stack([constraint.project(e.reshape(SHAPE)).ravel() for e in np.eye(16)])
    np.testing.assert_allclose(basis, basis.T, atol=atol())
    assert np.linalg.matrix_rank(basis) == constraint.nnz(SHAPE)


@pytest.mark.parametrize(
    ("constraint", "member"),
    [
        (Circulant(), scipy.linalg.circulant([1.0, 2, 3, 4])),
        (Toeplitz(), scipy.linalg.toeplitz([1.0, 2, 3, 4], [1.0, 5, 6])),
        (Hankel(), scipy.linalg.hankel([1.0, 2, 3], [3.0, 4, 5, 6])),
        (BlockDiagonal(2), scipy.linalg.block_diag(np.ones((3, 2)), np.ones((3, 2)))),
        (Triangular(), np.tri(3, 5)),
        (Triangular(upper=True), np.tri(5, 3).T),
        (Diagonal(), np.eye(3, 5)),
        (NonNegative(), np.ones((2, 3))),
        (MaxRank(1), np.outer([1.0, 2], [3.0, 4, 5])),
        (UnitNormColumns(), np.eye(3)[:, :2]),
    ],
)
def test_members_are_left_alone(constraint, member):
    np.testing.assert_allclose(constraint.project(member), member, atol=atol())


@each(OTHERS)
def test_no_random_member_is_nearer(constraint, rng):
    array = rng.standard_normal(SHAPE)
    nearest = constraint.project(array)
    distance = np.linalg.norm(array - nearest)
    for size in (1e-3, 0.1, 3.0):
        for _ in range(50):
            member = constraint.project(nearest + size * rng.standard_normal(SHAPE))
            assert distance <= np.linalg.norm(array - member) + atol()


def test_unit_norm_columns_handles_zero_and_huge_columns():
    array = np.array([[0.0, 3e200], [0.0, 4e200]])
    np.testing.assert_allclose(UnitNormColumns().project(array), [[1, 0.6], [0, 0.8]])


@each(ALL)
@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_array_libraries_agree(constraint, library, rng):
    array = rng.standard_normal(SHAPE)
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip("torch")
    projected = constraint.project(xp.asarray(array))
    np.testing.assert_allclose(
        backend.to_numpy(projected), constraint.project(array), atol=10 * atol()
    )


@each(ALL)
def test_complex_matrices_stay_complex(constraint, rng):
    array = rng.standard_normal(SHAPE) + 1j * rng.standard_normal(SHAPE)
    once = constraint.project(array)
    assert once.dtype == array.dtype
    np.testing.assert_allclose(constraint.project(once), once, atol=10 * atol())


# The union rule chooses its support by the values, which scaling changes.
@each([c for c in ALL if c.is_scale_free and not isinstance(c, RowColumnSparsity)])
def test_scale_free_sets_survive_row_and_column_scaling(constraint, rng):
    member = constraint.project(rng.standard_normal(SHAPE))
    scaled = rng.uniform(0.5, 2, (4, 1)) * member * rng.uniform(0.5, 2, 4)
    np.testing.assert_allclose(constraint.project(scaled), scaled, atol=atol())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalSparsity(0), "k must be"),
        (lambda: RowSparsity(0.5), "k must be"),
        (lambda: NMSparsity(3, 2), "n must be at most m=2"),
        (lambda: MaxRank(True), "rank must be"),
        (lambda: BlockDiagonal(5).nnz((4, 9)), "n_blocks must be at most 4"),
        (lambda: Circulant().nnz((3, 4)), "square"),
        (lambda: FixedSupport(np.ones(3)), "2-D"),
        (lambda: FixedSupport(np.ones((2, 2))).nnz((3, 3)), "shape of the factor"),
        (lambda: BlockSparsity(2, (4,)), "block_shape must be two integers"),
        (lambda: BlockSparsity(2, (4, 0)), "block_shape must be"),
        (lambda: FixedSupport.random((2, 2), 5), "k must be at most 4"),
        (lambda: get_constraint("sparse"), "name must be one of"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ragged_blocks_are_kept_whole(rng):
    array = rng.uniform(1, 2, (5, 7))
    support = BlockSparsity(2, (2, 3)).support(array)
    blocks = [support[i : i + 2, j : j + 3] for i in range(0, 5, 2) for j in range(0, 7, 3)]
    assert all(block.all() or not block.any() for block in blocks)
    assert sum(block.all() for block in blocks) == 2


def test_random_support_is_the_same_for_one_seed():
    first, second = (FixedSupport.random((6, 8), 17, 0).support_mask for _ in "ab")
    assert np.count_nonzero(first) == 17
    np.testing.assert_array_equal(first, second)
    assert np.any(first != FixedSupport.random((6, 8), 17, 1).support_mask)


@each([RowSparsity(2), ColumnSparsity(2), NMSparsity(1, 2), GlobalSparsity(4), Triangular()])
def test_transposed_sets_hold_the_transposed_matrices(constraint, rng):
    array = rng.standard_normal((4, 6))
    flipped = transposed(constraint)
    np.testing.assert_array_equal(flipped.project(array.T), constraint.project(array).T)
    np.testing.assert_array_equal(flipped.support(array.T), constraint.support(array).T)
    assert flipped.nnz((6, 4)) == constraint.nnz((4, 6))
    assert transposed(flipped) == constraint


def test_registry_knows_every_constraint():
    assert {type(constraint) for constraint in ALL} == set(CONSTRAINTS.values())
    assert get_constraint("n_m_sparsity", n=2, m=4) == NMSparsity(2, 4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
