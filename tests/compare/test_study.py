import dataclasses
import pickle

import joblib
import numpy as np
import pytest

from matfact import LowRank, MagnitudePruner, compare_projections
from matfact.compare import METHODS
from matfact.factorizers import BaseFactorizer

RNG = np.random.RandomState(0)
MATRICES = {
    "a": RNG.standard_normal((20, 20)),
    "wide": RNG.standard_normal((12, 30)),
    "b": RNG.standard_normal((24, 24)).astype(np.float32),
}


class Broken(BaseFactorizer):
    """Cannot factorize a matrix with 30 columns."""

    def _factorize(self, W, history):
        if W.shape[1] == 30:
            raise RuntimeError("thirty")
        return MagnitudePruner()._factorize(W, history)


class Seeded(MagnitudePruner):
    """Has a random_state, of which it tells through its warning."""

    def __init__(self, density=None, random_state=None):
        super().__init__(density)
        self.random_state = random_state

    _parameter_constraints = {**MagnitudePruner._parameter_constraints, "random_state": [int]}  # noqa: RUF012

    def _factorize(self, W, history):
        import warnings

        warnings.warn(f"seed {self.random_state}", stacklevel=2)
        return super()._factorize(W, history)


def without_seconds(comparison):
    return [dataclasses.replace(row, seconds=None) for row in comparison]


def test_rows_are_what_direct_fits_give():
    densities = (0.25, 0.5)
    table = compare_projections(MATRICES, ["lowrank", "magnitude"], densities=densities)
    estimators = {"lowrank": LowRank, "magnitude": MagnitudePruner}
    expected = [
        (name, method, density, estimators[method](density=density).fit(W))
        for name, W in MATRICES.items()
        for method in estimators
        for density in densities
    ]
    assert len(table) == len(expected)
    for row, (name, method, density, fitted) in zip(table, expected, strict=True):
        assert (row.matrix, row.method, row.requested_density) == (name, method, density)
        assert (row.rows, row.columns) == MATRICES[name].shape
        assert row.relative_error == fitted.reconstruction_err_
        assert row.normalized_error == fitted.normalized_err_
        assert (row.nnz, row.density) == (fitted.nnz_, fitted.density_)
        assert row.flops_ratio == fitted.operator_.flops_ratio
        assert row.seconds > 0


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_parallel_is_serial(backend):
    serial = compare_projections(MATRICES, ["lowrank", "magnitude"], n_jobs=1)
    with joblib.parallel_config(backend, n_jobs=2):
        parallel = compare_projections(MATRICES, ["lowrank", "magnitude"])
    assert without_seconds(serial) == without_seconds(parallel)


def test_a_failing_method_loses_nothing_else():
    table = compare_projections(MATRICES, [("broken", Broken()), "magnitude"])
    failed = [row for row in table if row.status == "failed"]
    assert [(row.matrix, row.method, row.message) for row in failed] == [
        ("wide", "broken", "RuntimeError('thirty')")
    ]
    assert all(np.isfinite(row.relative_error) for row in table if row not in failed)


def test_a_density_too_small_for_the_structure_is_a_failed_row():
    (row,) = compare_projections([np.eye(8)], ["lowrank"], densities=[0.1])
    assert row.status == "failed"
    assert "density=0.1" in row.message
    assert row.normalized_error is None


def test_progress_hears_of_every_fit():
    heard = []
    table = compare_projections(
        MATRICES, ["lowrank"], n_jobs=2, progress=lambda row, total: heard.append((row, total))
    )
    assert {total for _, total in heard} == {len(table)}
    assert sorted(row.matrix for row, _ in heard) == sorted(row.matrix for row in table)


def test_progress_may_stop_the_study():
    def stop(row, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_projections(MATRICES, ["lowrank"], progress=stop)


def test_the_seed_reaches_every_estimator_without_one():
    methods = [("free", Seeded()), ("fixed", Seeded(random_state=5))]
    table = compare_projections([np.eye(4)], methods, random_state=3)
    assert [row.message for row in table] == ["seed 3", "seed 5"]


def test_estimators_and_matrices_are_left_as_they_were():
    estimator, W = LowRank(), np.random.RandomState(0).standard_normal((9, 9))
    before = W.copy()
    compare_projections([W], [("mine", estimator)])
    assert vars(estimator) == vars(LowRank())
    np.testing.assert_array_equal(W, before)


def test_torch_matrices_are_compared_like_numpy_ones():
    torch = pytest.importorskip("torch")
    tensors = {name: torch.asarray(W) for name, W in MATRICES.items()}
    ours, theirs = (compare_projections(m, ["lowrank"]) for m in (MATRICES, tensors))
    for row, other in zip(ours, theirs, strict=True):
        assert row.relative_error == pytest.approx(other.relative_error, rel=1e-5)


def test_every_registered_method_has_an_estimator_and_a_row():
    table = compare_projections([np.random.RandomState(0).standard_normal((64, 64))])
    assert [row.method for row in table] == list(METHODS)
    assert [row.message for row in table if row.status == "failed"] == []
    assert all(row.density <= row.requested_density for row in table if row.requested_density)


def test_metadata_tells_seed_versions_and_parameters():
    table = compare_projections(MATRICES, ["lowrank"], random_state=7)
    assert table.metadata["random_state"] == 7
    assert table.metadata["methods"] == {"lowrank": "LowRank()"}
    assert table.metadata["versions"]["numpy"] == np.__version__
    assert table.metadata["dtype"] == ["float32", "float64"]


def test_rows_can_be_pickled():
    (row,) = compare_projections([np.eye(3)], ["magnitude"])
    assert pickle.loads(pickle.dumps(row)) == row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrices": {}}, "matrices must hold at least one"),
        ({"matrices": [np.ones(3)]}, r"matrices must hold 2-D arrays.*\(3,\).*'0'"),
        ({"methods": []}, "methods must hold at least one"),
        ({"methods": ["nonsense"]}, "methods must hold names among .*'nonsense'"),
        ({"methods": ["lowrank", "lowrank"]}, "methods must have different names.*'lowrank'"),
        ({"methods": [("mine", 3)]}, "methods must hold names"),
        ({"densities": []}, "densities must be a sequence"),
        ({"densities": 0.5}, "densities must be a sequence.*0.5"),
        ({"densities": [1.5]}, "density must be .* got 1.5"),
        ({"n_jobs": 0}, "n_jobs"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_projections(**{"matrices": MATRICES, "methods": ["magnitude"], **arguments})
