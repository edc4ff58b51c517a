"""The estimators are scikit-learn estimators, and work with its tools."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from matfact import (
    CoSaMPNeuronSelector,
    KaleidoscopeFit,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
)
from tests.conformance.estimators import ESTIMATORS


def _expected_failures(estimator):
    if type(estimator).__name__ in ("ButterflyFit", "KaleidoscopeFit", "MonarchProjector"):
        # Fourier matrices are complex, so that complex data are welcome here.
        return {"check_complex_data": "complex matrices are factorized, not refused"}
    return {}


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=_expected_failures)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture
def W():
    return np.random.default_rng(0).standard_normal((24, 16))


def test_attributes_promised_after_fit_are_there_and_agree(factorizer, W):
    model = factorizer.fit(W)
    W_hat = model.operator_.toarray()
    error = np.linalg.norm(W - W_hat) / np.linalg.norm(W)
    assert model.reconstruction_err_ == pytest.approx(error)
    assert model.score(W) == -model.reconstruction_err_
    assert model.factors_ == model.operator_.factors
    assert model.nnz_ == model.operator_.nnz
    assert model.density_ == model.nnz_ / W.size
    assert model.n_features_in_ == 16
    assert model.n_iter_ >= 1
    assert len(model.history_["objective"]) == len(model.history_["seconds"]) >= 1
    assert model.history_["seconds"] == sorted(model.history_["seconds"])
    X = np.random.default_rng(1).standard_normal((5, 16))
    np.testing.assert_allclose(model.transform(X), X @ W_hat.T)


def test_bits_per_weight_are_those_of_the_tensors_in_a_file(factorizer, W, tmp_path):
    model = factorizer.fit(W)
    model.operator_.save(tmp_path / "p.safetensors")
    content = (tmp_path / "p.safetensors").read_bytes()
    assert model.operator_.nbytes("stored") == len(content)
    header = 8 + int.from_bytes(content[:8], "little")
    assert model.bits_per_weight_ == 8 * (len(content) - header) / W.size


def test_normalized_error_divides_by_pruning_at_the_same_values(factorizer, W):
    model = factorizer.fit(W)
    dropped = np.sort(np.abs(W), axis=None)[: W.size - model.nnz_]
    pruning = np.linalg.norm(dropped) / np.linalg.norm(W)
    assert model.normalized_err_ == pytest.approx(model.reconstruction_err_ / pruning)


def test_fitted_model_survives_pickling(factorizer, W):
    model = factorizer.fit(W)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.transform(W), model.transform(W))
    assert loaded.reconstruction_err_ == model.reconstruction_err_


def test_parameters_are_set_cloned_and_validated(factorizer, W):
    copy = clone(factorizer).set_params(**factorizer.get_params())
    assert copy.get_params() == factorizer.get_params()
    for name in copy.get_params():
        bad = clone(factorizer).set_params(**{name: object()})
        with pytest.raises(ValueError, match=name):
            bad.fit(W)


def test_serves_as_a_step_of_a_pipeline(factorizer, W):
    pipeline = make_pipeline(StandardScaler(), factorizer)
    assert pipeline.fit_transform(W).shape == (24, 24)
    assert len(pipeline.get_feature_names_out()) == 24


def test_grid_search_finds_the_better_density(factorizer, W):
    whole = [(np.arange(24), np.arange(24))]
    search = GridSearchCV(factorizer, {"density": [0.25, 0.6]}, cv=whole, error_score="raise")
    assert search.fit(W).best_params_ == {"density": 0.6}


def test_folds_of_rows_have_finite_scores_that_grow_with_the_density(factorizer, W):
    for folds in (None, 2):  # of two, one has as many rows as were fitted
        search = GridSearchCV(factorizer, {"density": [0.3, 0.9]}, cv=folds, error_score="raise")
        scores = search.fit(W + 5 * np.outer(W[:, 0], W[0])).cv_results_["mean_test_score"]
        assert np.isfinite(scores).all()
        assert -1 <= scores[0] < scores[1] <= 0


def test_rows_held_out_are_projected_on_the_span_of_low_rank_factors(W):
    model = LowRank(density=0.5).fit(W)
    basis = np.linalg.qr(model.factors_[1].toarray().T)[0]
    new = np.random.default_rng(1).standard_normal((7, 16))
    lost = np.linalg.norm(new - new @ basis @ basis.T) / np.linalg.norm(new)
    assert model.score(new) == pytest.approx(-lost)
    pruned = MagnitudePruner(density=0.5).fit(W)
    assert pruned.score(new) == pytest.approx(MagnitudePruner(density=0.5).fit(new).score(new))


@pytest.mark.parametrize("estimator", [KaleidoscopeFit(max_iter=5), MonarchProjector()])
def test_complex_rows_are_scored(estimator):
    W = np.fft.fft(np.eye(12))
    scores = cross_val_score(estimator, W, error_score="raise")
    assert ((scores >= -1) & (scores <= 0)).all()


def test_selections_of_units_are_scored_on_the_outputs_they_rebuild(W):
    y = W[:, :2] @ np.ones((2, 3))
    search = GridSearchCV(CoSaMPNeuronSelector(), {"n_neurons": [1, 2]}, error_score="raise")
    assert search.fit(W, y).best_params_ == {"n_neurons": 2}
    assert search.best_score_ == pytest.approx(0, abs=1e-6)
    assert np.isfinite(cross_val_score(CoSaMPNeuronSelector(), W, y[:, 0])).all()
