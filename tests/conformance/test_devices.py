"""Results stay on the device of the input, and little passes through the host."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone

from matfact import (
    ADMMPruner,
    BlockSVD,
    ButterflyFit,
    CoSaMPNeuronSelector,
    DoubleSparseFactorizer,
    KaleidoscopeFit,
    MonarchProjector,
    Palm4MSA,
    Quantized,
    backend,
    metrics,
)
from matfact.calibration import InputStatistics, MapStatistics, OutputStatistics
from matfact.constraints import GlobalSparsity
from matfact.factorizers import METHODS
from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    SelectionFactor,
    SignFactor,
    SparseFactor,
)
from matfact.solvers import descent, palm
from matfact.solvers._callback import History
from matfact.solvers.double_binary import double_binary
from matfact.solvers.dsf import dsf
from matfact.solvers.finalize import finalize, reselect
from matfact.solvers.layerwise import admm_prune
from tests import cupy_double
from tests.conformance.estimators import FACTORIZERS, QUANTIZED
from tests.conformance.libraries import PLACES
from tests.constraints.test_constraints import ALL

ESTIMATORS = {
    **FACTORIZERS,
    **QUANTIZED,
    "quantized": Quantized(ADMMPruner(), bits=8),
    "kaleidoscope": KaleidoscopeFit(),
    "learned-butterfly": ButterflyFit(permutation="learned"),
    "learned-monarch": MonarchProjector(permute=True),
    "learned-blocks": BlockSVD(permute=True, blocking=(2, 2)),
}
#: Those that copy more than positions and single numbers to the host, as the documentation says.
THROUGH_HOST = {
    "blocksvd", "double-binary", "gptq", "kaleidoscope", "obs", "quantized", "quantized-admm",
    "rtn", "learned-butterfly", "learned-monarch", "learned-blocks",
}  # fmt: skip
#: Those that need no positions: the strict library itself finds none without 64 bits.
WITHOUT_POSITIONS = {"blocksvd", "double-binary", "lowrank", "rtn"}


@pytest.fixture(params=PLACES)
def place(request):
    with PLACES[request.param]() as place:
        yield place


@pytest.fixture
def double():
    with PLACES["cupy-double"]() as place:
        yield place


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def W(rng):
    return rng.standard_normal((24, 40)).astype(np.float32)


@pytest.fixture
def X(rng):
    return (rng.standard_normal((200, 40)) * np.linspace(0.1, 2.0, 40)).astype(np.float32)


def quick(name):
    """Return the estimator with few iterations."""
    model = clone(ESTIMATORS[name])
    return model.set_params(max_iter=5) if "max_iter" in model.get_params() else model


def same_place(array, given):
    return type(array) is type(given) and backend.device(array) == backend.device(given)


def assert_close(array, expected, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(backend.to_numpy(array), expected, rtol=rtol, atol=atol)


def test_every_method_is_tried():
    tried = {type(estimator) for estimator in ESTIMATORS.values()}
    assert {type(method.estimator) for method in METHODS.values()} <= tried


@pytest.mark.parametrize("name", ESTIMATORS)
def test_fits_stay_there_and_agree_with_numpy(name, place, W, X):
    if place.name == "no_x64" and name not in WITHOUT_POSITIONS:
        pytest.skip("the strict library finds no nonzeros without 64 bits")
    model, expected = quick(name), quick(name)
    inputs = {"calibration": X} if model.uses_inputs else {}
    given = place(W)
    expected.fit(W, **inputs)
    model.fit(given, **{key: place(value) for key, value in inputs.items()})
    # Rounding may lead iterative methods to other supports, hardly to another error.
    assert model.reconstruction_err_ == pytest.approx(expected.reconstruction_err_, rel=0.03)
    if inputs:
        assert model.layer_err_ == pytest.approx(expected.layer_err_, rel=0.03)
    assert all(same_place(factor.numbers, given) for factor in model.factors_)
    outputs = model.transform(place(X[:3]))
    assert same_place(outputs, given)
    assert outputs.dtype == given.dtype
    assert_close(outputs, X[:3] @ backend.to_numpy(model.operator_.toarray()).T)


def test_scores_of_other_rows_are_found_there(place, W):
    given = place(W)
    model = ESTIMATORS["lowrank"]
    expected = clone(model).fit(W).score(W[:5])
    assert clone(model).fit(given).score(given[:5, :]) == pytest.approx(expected, rel=1e-3)


def test_arrays_of_another_library_are_refused_by_name(place, W, X):
    there, here = (MonarchProjector().fit(V) for V in (place(W), W))
    refused = r"^X must have the library and device of the factors, \w+ on .+, got \w+ on "
    for model, put in ((there, np.asarray), (here, place)):
        inputs, rows = put(X), put(W)
        with pytest.raises(ValueError, match=refused):
            model.operator_ @ inputs.T
        with pytest.raises(ValueError, match=refused):
            model.transform(inputs)
        with pytest.raises(ValueError, match=r"^W must have the library and device of the factors"):
            model.score(rows)


@pytest.mark.parametrize("constraint", ALL, ids=repr)
def test_projections_stay_there(constraint, place, rng):
    array = rng.integers(-3, 4, (4, 4)).astype(np.float32)  # with ties
    given = place(array)
    projected, support = constraint.project(given), constraint.support(given)
    assert same_place(projected, given)
    assert same_place(support, given)
    assert_close(projected, constraint.project(array), atol=1e-6)


FACTORS = {
    "csr": lambda put, M: SparseFactor.from_dense(put(np.where(M > 0, M, 0).astype(M.dtype))),
    "dense": lambda put, M: DenseFactor(put(M)),
    "blocks": lambda put, M: BlockSparseFactor.from_blocks(
        [put(M[:2, :3]), put(M[4:6, 4:])], [(0, 0), (4, 4)], M.shape, put(M)
    ),
    "kronecker": lambda put, M: KroneckerSparseFactor(put(M.reshape(2, 3, 2, 4))),
    "selection": lambda put, M: SelectionFactor.from_index([3, -1, 0, 2, 5, 1], 8, put(M)),
    "sign": lambda put, M: SignFactor.from_dense(put(M)),
    "quantized": lambda put, M: FactorProduct([DenseFactor(put(M))]).quantized(4).factors[0],
}


@pytest.mark.parametrize("kind", FACTORS)
def test_products_stay_there(kind, place, rng):
    if place.name == "no_x64" and kind == "csr":
        pytest.skip("the strict library finds no nonzeros without 64 bits")
    M = rng.standard_normal((6, 8)).astype(np.float32)
    V = rng.standard_normal((FACTORS[kind](np.asarray, M).shape[1], 3)).astype(np.float32)
    factor, expected = FACTORS[kind](place, M), FACTORS[kind](np.asarray, M)
    dense, product = expected.toarray(), FactorProduct([factor])
    for array, right in [
        (product.toarray(), dense),
        (product @ place(V), dense @ V),
        (product.T.toarray(), dense.T),
        (product.H @ (product @ place(V)), dense.T @ (dense @ V)),
    ]:
        assert same_place(array, place(M))
        assert_close(array, right)
    assert factor.norm == pytest.approx(expected.norm, rel=1e-5)
    np.testing.assert_array_equal(factor.locations, expected.locations)
    if kind not in ("selection", "sign"):
        assert_close((product * 2.0).toarray(), 2 * dense)


def test_products_are_saved_from_there_and_become_numpy_arrays(place, W, tmp_path):
    product = clone(ESTIMATORS["lowrank"]).fit(place(W)).operator_
    product.save(tmp_path / "product.safetensors")
    dense = FactorProduct.load(tmp_path / "product.safetensors").toarray()
    np.testing.assert_array_equal(dense, np.asarray(product))
    assert product.advise(4).method in ("factors", "dense")


def test_errors_are_measured_there(place, W, X):
    close = (1.01 * W + 0.01).astype(np.float32)
    gram = X.astype(np.float64).T @ X
    given, given_close = place(W), place(close)
    approx = pytest.approx
    assert metrics.relative_error(given, given_close) == approx(
        metrics.relative_error(W, close), rel=1e-4
    )
    assert metrics.layer_error(given, given_close, place(gram)) == approx(
        metrics.layer_error(W, close, gram), rel=1e-3
    )
    for nnz in (0, 1, 100, W.size - 1, W.size):
        assert metrics.magnitude_error(given, nnz) == approx(
            metrics.magnitude_error(W, nnz), rel=1e-4
        )


def test_statistics_stay_there(place, W, X):
    for half in (X, X[:50] + 1):
        statistics = InputStatistics().update(place(half)).update(place(half[:7]))
        expected = InputStatistics().update(half).update(half[:7])
        for each, known in [
            (statistics, expected),
            (statistics.centered(), expected.centered()),
            (statistics.damped(0.1), expected.damped(0.1)),
            (statistics.reordered(np.arange(40)[::-1]), expected.reordered(np.arange(40)[::-1])),
            (statistics + statistics, expected + expected),
        ]:
            assert same_place(each.gram, place(X))
            assert_close(each.gram, known.gram, atol=2e-2)
        mapped = MapStatistics(statistics, place(W))
        right = MapStatistics(expected, W)
        assert mapped.energy == pytest.approx(right.energy, rel=1e-3)
        assert mapped.squared_error(place(W / 2)) == pytest.approx(
            right.squared_error(W / 2), rel=1e-3
        )
    outputs = OutputStatistics().update(place(X), place(X @ W.T))
    known = OutputStatistics().update(X, X @ W.T)
    assert_close(outputs.centered().cross, known.centered().cross, atol=2e-2)
    assert outputs.squared_error(place(W / 2)) == pytest.approx(
        known.squared_error(W / 2), rel=1e-3
    )


@pytest.mark.parametrize("refit", [finalize, reselect])
def test_refits_stay_there(refit, place, W, X):
    if place.name == "no_x64":
        pytest.skip("the strict library finds no nonzeros without 64 bits")
    model = DoubleSparseFactorizer(density=0.4, max_iter=5)
    moment = X.astype(np.float64).T @ X / len(X)
    product = model.fit(place(W)).operator_
    found = refit(product, place(W), place(moment))
    expected = refit(model.fit(W).operator_, W, moment)
    error = metrics.layer_error(W, backend.to_numpy(found.toarray()), moment)
    assert same_place(found.toarray(), place(W))
    assert error == pytest.approx(metrics.layer_error(W, expected.toarray(), moment), rel=0.05)


def test_neurons_are_selected_there(place, rng):
    H = np.maximum(rng.standard_normal((60, 20)), 0)
    U = H @ rng.standard_normal((20, 5))
    expected = CoSaMPNeuronSelector(n_neurons=8).fit(H, U)
    selector = CoSaMPNeuronSelector(n_neurons=8).fit(place(H), place(U))
    np.testing.assert_array_equal(selector.get_support(), expected.get_support())
    assert same_place(selector.coef_, place(H))
    assert_close(selector.coef_, expected.coef_, rtol=1e-3, atol=1e-3)


def test_the_documentation_names_what_is_done_on_the_host():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "gpu.md").read_text(encoding="utf-8")
    assert {n for n in THROUGH_HOST if f"`{type(ESTIMATORS[n]).__name__}" in page} == THROUGH_HOST


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - THROUGH_HOST))
def test_only_positions_and_single_numbers_pass_through_the_host(name, double, W, X):
    model = quick(name)
    given, inputs = double(W), {"calibration": double(X)} if model.uses_inputs else {}
    cupy_double.traffic.clear()
    model.fit(given, **inputs)
    down = [array for array in cupy_double.traffic.down if array.dtype.kind in "fc"]
    assert all(array.size < 16 for array in down)


def test_the_double_refuses_what_cupy_refuses(double, W):
    array = double(W)
    for use in (np.asarray, np.abs, lambda a: a + W, lambda a: W * a, lambda a: a[W > 0]):
        with pytest.raises(TypeError):
            use(array)
    with pytest.raises(TypeError):
        backend.namespace(array).partition(array, 3, kind="introselect")  # CuPy has no such option
    assert not hasattr(backend.namespace(array), "pad_sequences")
    assert isinstance(array.get(), np.ndarray)


def waits(run, *args):
    """Return what `run` gives, and how often it made the host wait for the device."""
    cupy_double.traffic.clear()
    return run(*args), cupy_double.traffic.waits


def fit(model):
    return lambda W, n: clone(model).set_params(max_iter=n, tol=0.0).fit(W).n_iter_


def prune(W, n):
    admm_prune(W, backend.namespace(W).matmul(W.T, W), HALF, max_iter=n, callback=History())
    return n


HALF = GlobalSparsity(500)
SWEEPS = {
    "dsf": lambda W, n: dsf(W, HALF, HALF, max_iter=n, callback=History())[2],
    "double-binary": lambda W, n: double_binary(W, 32, max_iter=n, callback=History())[1],
    "admm": prune,
    "butterfly": fit(ButterflyFit(chain="square_dyadic")),
}


@pytest.mark.parametrize("side", [27, 32])
@pytest.mark.parametrize("name", SWEEPS)
def test_the_host_waits_once_a_sweep(name, side, double, rng):
    W = double(rng.standard_normal((side, side)))
    (first, few), (last, many) = (waits(SWEEPS[name], W, n) for n in (2, 12))
    assert last > first
    assert many - few <= last - first


def test_descent_waits_once_for_each_point_it_tries(double, rng, monkeypatch):
    tried, measured = [], descent.loss_and_gradient
    monkeypatch.setattr(
        descent, "loss_and_gradient", lambda *args: tried.append(1) or measured(*args)
    )
    W, totals = double(rng.standard_normal((32, 32))), []
    for max_iter in (5, 25):
        tried.clear()
        _, count = waits(fit(KaleidoscopeFit()), W, max_iter)
        totals.append((len(tried), count))
    assert totals[1][1] - totals[0][1] <= totals[1][0] - totals[0][0]


def test_palm_waits_once_a_sweep_and_for_each_step_that_is_too_long(double, rng, monkeypatch):
    W = rng.standard_normal((32, 32))
    run = fit(Palm4MSA(n_factors=3))
    counts = [waits(run, double(W), n)[1] for n in (5, 25)]
    along, taken = palm._Step.along, []
    monkeypatch.setattr(palm._Step, "along", lambda *args: taken.append(1) or along(*args))
    run(W, 5)
    first = len(taken)
    run(W, 25)  # on the host a step is taken again if it was too long, and no other
    too_long = len(taken) - 2 * first - 3 * 20
    assert counts[1] - counts[0] <= 20 + too_long
