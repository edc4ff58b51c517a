"""Bad input is refused by name, before any work; odd input is factorized."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone

from matfact import backend
from tests.conformance.estimators import ESTIMATORS


@pytest.fixture
def W():
    return np.random.default_rng(0).standard_normal((24, 24))


def _with_entry(value, dtype=float):
    W = np.ones((24, 24), dtype)
    W[3, 4] = value
    return W


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_with_entry(np.nan), "W must be finite.*NaN"),
        (_with_entry(np.inf), "W must be finite.*infinity"),
        (_with_entry(-np.inf, np.float16), "W must be finite.*infinity"),
        (np.ones(8), "W must be a 2-D array, got 1-D"),
        (np.float64(3.0), "2-D array"),
        (np.ones((4, 4, 4)), "W must be a 2-D array, got 3-D"),
        (np.ones((0, 4)), "W must not be empty"),
        (np.ones((4, 0)), "W must not be empty"),
        ([["a", "b"], ["c", "d"]], "could not convert|numeric"),
    ],
    ids=["nan", "inf", "half-inf", "1d", "0d", "3d", "no-rows", "no-columns", "text"],
)
def test_bad_matrices_are_refused(factorizer, bad, message):
    with pytest.raises(ValueError, match=message):
        factorizer.fit(bad)
    assert not hasattr(factorizer, "operator_")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ma.masked_less(np.eye(8), 0.5), ValueError, "W must have a value everywhere"),
        (np.ones((8, 8), "M8[s]"), ValueError, r"W must hold numbers, got .* datetime64"),
        (np.ones((8, 8), [("a", float)]), ValueError, "W must hold numbers, got an array of dtype"),
        (np.full((8, 8), 1j, object), TypeError, "W must hold real numbers, but"),
        (np.matrix(np.eye(8)), TypeError, "matrix"),
    ],
    ids=["masked", "dates", "records", "complex-objects", "matrix"],
)
def test_what_is_no_array_of_numbers_is_refused(factorizer, bad, error, message):
    with pytest.raises(error, match=message):
        factorizer.fit(bad)


def _read_only(W):
    W = W.copy()
    W.flags.writeable = False
    return W


@pytest.mark.parametrize(
    "change",
    [lambda W: W.astype(">f8"), lambda W: W.astype(">f4"), lambda W: W.astype(">f2"),
     lambda W: W.astype(np.longdouble), lambda W: W.astype(">i4"), lambda W: W.astype(object),
     np.asfortranarray, _read_only, lambda W: np.repeat(W, 2, axis=1)[:, ::2], lambda W: W[::-1]],
    ids=["big-endian", "big-endian-single", "big-endian-half", "long", "big-endian-integers",
         "objects", "fortran", "read-only", "strided", "reversed"],
)  # fmt: skip
def test_numbers_count_however_they_are_stored(factorizer, W, change):
    W = np.round(4 * W)  # exact in every dtype
    changed = change(W)
    found = clone(factorizer).fit(changed)
    native = np.ascontiguousarray(changed)
    native = native.astype(np.float64 if native.dtype.kind in "iO" else native.dtype)
    if native.dtype == np.longdouble:
        native = native.astype(np.float64)
    expected = factorizer.fit(native.astype(native.dtype.newbyteorder("=")))
    assert found.operator_.dtype == expected.operator_.dtype
    assert found.operator_.dtype.isnative
    np.testing.assert_array_equal(found.operator_.toarray(), expected.operator_.toarray())
    np.testing.assert_array_equal(found.transform(changed), expected.transform(native))


def test_complex_matrices_are_refused_where_unsupported(factorizer):
    if factorizer._allow_complex:
        pytest.skip("complex matrices are supported")
    with pytest.raises(ValueError, match="W must be real"):
        factorizer.fit(np.ones((8, 8)) * 1j)


def test_sparse_matrices_are_refused_with_advice(factorizer):
    with pytest.raises(TypeError, match=r"toarray|dense"):
        factorizer.fit(scipy.sparse.eye_array(8).tocsr())


@pytest.mark.parametrize("density", [0, -0.1, 1.5, np.nan, "half", True])
def test_impossible_densities_are_refused(factorizer, W, density):
    with pytest.raises(ValueError, match="density"):
        factorizer.set_params(density=density).fit(W)


def test_density_below_the_structure_is_refused_with_the_least_possible(factorizer):
    with pytest.raises(ValueError, match=r"density=1e-06 allows 0 stored values .* at least \d+"):
        factorizer.set_params(density=1e-6).fit(np.ones((16, 16)))


def test_zero_matrix_has_error_zero(factorizer):
    model = factorizer.fit(np.zeros((12, 16)))
    assert model.reconstruction_err_ == 0.0
    assert model.normalized_err_ == 0.0
    np.testing.assert_array_equal(model.operator_.toarray(), np.zeros((12, 16)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 30), (7, 13), (13, 7), (31, 31)])
@pytest.mark.parametrize("kind", ["gaussian", "constant", "rank-one", "one-entry", "duplicates"])
def test_odd_shapes_and_degenerate_matrices(factorizer, shape, kind):
    rng = np.random.default_rng(0)
    W = {
        "gaussian": rng.standard_normal(shape),
        "constant": np.full(shape, -3.0),
        "rank-one": np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])),
        "one-entry": np.zeros(shape),
        "duplicates": np.repeat(rng.standard_normal((1, shape[1])), shape[0], axis=0),
    }[kind]
    if kind == "one-entry":
        W[-1, -1] = 2.0
    model = factorizer.fit(W)
    assert np.all(np.isfinite(model.operator_.toarray()))
    assert model.reconstruction_err_ <= 1 + 1e-12
    if kind == "one-entry":
        assert model.reconstruction_err_ < 1e-6


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_extreme_scales_change_nothing(factorizer, W, scale):
    usual = factorizer.fit(W).reconstruction_err_
    with np.errstate(over="raise", invalid="raise"):
        assert factorizer.fit(W * scale).reconstruction_err_ == pytest.approx(usual, rel=0.05)


def test_subnormal_entries_do_not_break_a_fit(factorizer):
    W = np.random.default_rng(0).standard_normal((12, 12)) * 1e-310
    assert factorizer.fit(W).reconstruction_err_ <= 1.0


def test_integers_booleans_and_lists_are_read_as_float64(factorizer):
    integers = np.random.default_rng(0).integers(-3, 4, (12, 12))
    usual = factorizer.fit(integers.astype(float)).operator_.toarray()
    for same in (integers, integers.astype(np.int8), integers.tolist()):
        found = factorizer.fit(same).operator_.toarray()
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, usual)
    assert factorizer.fit(integers > 0).operator_.dtype == np.float64


def test_memory_layout_changes_nothing_and_input_is_left_alone(factorizer, W):
    W = W / backend.unit(W)  # of a scale of which no fit makes a copy
    usual = factorizer.fit(W).operator_.toarray()
    padded = np.zeros((48, 48))
    padded[::2, ::2] = W
    read_only = W.copy()
    read_only.flags.writeable = False
    for same in (np.asfortranarray(W), padded[::2, ::2], read_only, W[::-1][::-1]):
        before = same.copy()
        # BLAS may round another layout differently.
        found = factorizer.fit(same).operator_.toarray()
        assert np.linalg.norm(found - usual) <= 0.2 * np.linalg.norm(usual)
        np.testing.assert_array_equal(same, before)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_unfitted_estimators_say_so(estimator, W):
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        clone(estimator).transform(W)


def test_transform_refuses_another_width(factorizer, W):
    with pytest.raises(ValueError, match="24 features"):
        factorizer.fit(W).transform(W[:, :5])
