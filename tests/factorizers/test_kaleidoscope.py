"""KaleidoscopeFit: structured matrices to rounding, never worse than a butterfly."""

import array_api_strict
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact import ButterflyFit, KaleidoscopeFit, backend
from matfact.operators import FactorProduct, KroneckerSparseFactor
from matfact.solvers._callback import History
from matfact.solvers.descent import descend, loss_and_gradient

EXACT = 1e-13


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 64), st.booleans())
def test_circulant_matrices_are_recovered(n, is_complex):
    if scipy.fft.next_fast_len(n, real=True) != n:
        return
    rng = np.random.default_rng(n)
    c = rng.standard_normal(n) + (1j * rng.standard_normal(n) if is_complex else 0)
    model = KaleidoscopeFit(complex_pairs=not is_complex).fit(scipy.linalg.circulant(c))
    assert model.reconstruction_err_ < EXACT


@pytest.mark.parametrize("shape", [(32, 32), (40, 60), (13, 7)])
@pytest.mark.parametrize("dtype", [float, complex])
def test_toeplitz_matrices_are_recovered_with_expansion_two(shape, dtype):
    rng = np.random.default_rng(0)
    c, r = (rng.standard_normal((n, 2)).view(complex)[:, 0] for n in shape)
    W = scipy.linalg.toeplitz(c, r).astype(complex)
    if dtype is float:
        W = W.real
    model = KaleidoscopeFit(expansion=2, complex_pairs=dtype is float).fit(W)
    assert model.reconstruction_err_ < EXACT


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_butterflies_and_their_transposes_are_recovered(width, is_transposed):
    W = ButterflyFit().fit(np.random.default_rng(0).standard_normal((32, 32))).operator_.toarray()
    model = KaleidoscopeFit(width).fit(W.T if is_transposed else W)
    assert model.reconstruction_err_ < EXACT


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1e-2])
def test_error_of_a_noisy_circulant_is_below_the_noise(noise):
    rng = np.random.default_rng(0)
    W = scipy.linalg.circulant(rng.standard_normal(64)) / 8
    N = rng.standard_normal((64, 64)) / 8
    relative = np.linalg.norm(noise * N) / np.linalg.norm(W + noise * N)
    model = KaleidoscopeFit(complex_pairs=True).fit(W + noise * N)
    assert model.reconstruction_err_ <= relative


@pytest.mark.parametrize("shape", [(64, 64), (20, 32), (32, 20)])
def test_wider_products_fit_better_and_all_better_than_a_butterfly(shape):
    W = np.random.default_rng(0).standard_normal(shape)
    butterfly = ButterflyFit(chain="square_dyadic").fit(W).reconstruction_err_
    one, two = (KaleidoscopeFit(width, max_iter=60).fit(W).reconstruction_err_ for width in (1, 2))
    assert two < one < butterfly


def test_loss_never_rises():
    model = KaleidoscopeFit().fit(np.random.default_rng(0).standard_normal((48, 48)))
    objective = model.history_["objective"]
    assert len(objective) == model.n_iter_ + 1
    assert objective == sorted(objective, reverse=True)


@pytest.mark.parametrize("asarray", [torch.asarray, array_api_strict.asarray])
def test_every_library_finds_the_same(asarray):
    W = np.random.default_rng(0).standard_normal((20, 24))
    expected = KaleidoscopeFit(max_iter=5).fit(W).operator_.toarray()
    found = backend.to_numpy(KaleidoscopeFit(max_iter=5).fit(asarray(W)).operator_.toarray())
    np.testing.assert_allclose(found, expected, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.0, 1.0]), st.booleans())
def test_constant_matrices_of_any_shape_are_finite(rows, columns, fill, complex_pairs):
    model = KaleidoscopeFit(complex_pairs=complex_pairs, max_iter=5).fit(
        np.full((rows, columns), fill)
    )
    assert model.operator_.shape == (rows, columns)
    assert model.reconstruction_err_ <= 1


def random_values(patterns, is_complex, rng):
    shapes = [(a, d, b, c) for a, b, c, d in patterns]
    return [
        rng.standard_normal(s) + (1j * rng.standard_normal(s) if is_complex else 0) for s in shapes
    ]


@pytest.mark.parametrize("is_complex", [False, True])
def test_gradients_agree_with_differences(is_complex):
    rng = np.random.default_rng(0)
    patterns = [(1, 2, 4, 3), (2, 6, 3, 1), (1, 3, 2, 2)]
    values, steps = (random_values(patterns, is_complex, rng) for _ in range(2))
    W = random_values([(1, 5, 3, 1)], is_complex, rng)[0][0, 0]
    _, gradients = loss_and_gradient(W, values)
    h = 1e-6
    ahead, behind = (
        loss_and_gradient(W, [v + s * d for v, d in zip(values, steps, strict=True)])[0]
        for s in (h, -h)
    )
    slope = 2 * sum(np.vdot(g, d).real for g, d in zip(gradients, steps, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


def test_descent_from_nearby_finds_a_product_that_is_no_butterfly():
    rng = np.random.default_rng(0)
    patterns = [(1, 2, 2, 4), (4, 2, 2, 1), (2, 2, 2, 2), (1, 2, 2, 4)]
    values = random_values(patterns, False, rng)
    W = FactorProduct([KroneckerSparseFactor(v) for v in values]).toarray()
    start = [v + 0.01 * rng.standard_normal(v.shape) for v in values]
    history = History()
    descend(W, start, max_iter=500, tol=0.0, callback=history)
    assert history.objective[-1] < 1e-20 * np.linalg.norm(W) ** 2


@pytest.mark.parametrize(
    ("options", "W", "message"),
    [
        ({"complex_pairs": True}, np.eye(4, dtype=complex), "complex_pairs must be False"),
        ({"width": 0}, np.eye(4), "width"),
        ({"expansion": 0}, np.eye(4), "expansion"),
        ({"max_iter": -1}, np.eye(4), "max_iter"),
        ({"width": 10**9}, np.eye(4), r"width.*\[1, 64\]"),
        ({"expansion": 10**9}, np.eye(4), "expansion must be at most 1024 for a 4×4 matrix"),
        ({}, np.ones((2, 10007)), "sides of at most 4096 .* got 2×10007"),
        ({}, np.ones((10007, 300)), "sides of at most 4800 .* got 10007×300"),
    ],
)
def test_bad_parameters_are_named(options, W, message):
    with pytest.raises(ValueError, match=message):
        KaleidoscopeFit(**options).fit(W)
