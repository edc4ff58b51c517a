"""The same code on every array library: results stay on the device, in the dtype given."""

import array_api_strict
import numpy as np
import pytest

from matfact import CoSaMPNeuronSelector, backend

torch = pytest.importorskip("torch")


def _to_strict(array):
    return array_api_strict.asarray(array)


LIBRARIES = {"strict": _to_strict, "torch": torch.from_numpy}
if torch.cuda.is_available():
    LIBRARIES["torch-cuda"] = lambda array: torch.from_numpy(array).cuda()


@pytest.fixture
def W():
    return np.random.default_rng(0).standard_normal((24, 40))


@pytest.fixture(params=LIBRARIES.values(), ids=LIBRARIES)
def convert(request):
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_stay_with_the_library_and_agree_with_numpy(factorizer, convert, W, dtype):
    W = W.astype(dtype)
    expected = factorizer.fit(W).reconstruction_err_
    given = convert(W)
    model = factorizer.fit(given)
    for factor in model.factors_:
        assert type(factor.values) is type(given)
        assert factor.values.dtype == given.dtype
        assert backend.device(factor.values) == backend.device(given)
    # Rounding may lead iterative methods to other supports, hardly to another error.
    assert model.reconstruction_err_ == pytest.approx(expected, rel=0.03)
    X = convert(np.ones((3, 40), dtype))
    outputs = model.transform(X)
    assert type(outputs) is type(given)
    assert outputs.dtype == given.dtype
    W_hat = backend.to_numpy(model.operator_.toarray())
    np.testing.assert_allclose(
        backend.to_numpy(outputs), np.ones((3, 40)) @ W_hat.T, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_given(factorizer, W, dtype):
    given = torch.from_numpy(W).to(dtype)
    model = factorizer.fit(given)
    assert {factor.dtype for factor in model.factors_} == {dtype}
    assert model.transform(given).dtype == dtype
    single = factorizer.fit(given.float())
    # Stored values are rounded to the dtype's precision, and no worse.
    rounding = 4 * torch.finfo(dtype).eps
    assert model.reconstruction_err_ == pytest.approx(
        single.reconstruction_err_, rel=0.02, abs=rounding
    )


def test_float16_arrays_of_numpy_are_returned_as_given(factorizer, W):
    model = factorizer.fit(W.astype(np.float16))
    assert {factor.dtype for factor in model.factors_} == {np.dtype(np.float16)}
    assert model.operator_.toarray().dtype == np.float16


def test_torch_parameters_that_need_gradients_are_read(factorizer, W):
    parameter = torch.nn.Linear(40, 24).weight
    model = factorizer.fit(parameter)
    assert not model.operator_.toarray().requires_grad


def test_neuron_selection_agrees_with_numpy(convert):
    rng = np.random.default_rng(0)
    H = np.maximum(rng.standard_normal((60, 20)), 0)
    U = H @ rng.standard_normal((20, 5))
    expected = CoSaMPNeuronSelector(n_neurons=8).fit(H, U)
    selector = CoSaMPNeuronSelector(n_neurons=8).fit(convert(H), convert(U))
    np.testing.assert_array_equal(selector.get_support(), expected.get_support())
    assert type(selector.coef_) is type(convert(H))
    np.testing.assert_allclose(backend.to_numpy(selector.coef_), expected.coef_, rtol=1e-6)
