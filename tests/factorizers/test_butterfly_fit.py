"""ButterflyFit: fast transforms to rounding, any shape, budgets, permutations."""

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from matfact import ButterflyFit, LowRank
from matfact.operators import FactorProduct, KroneckerSparseFactor

N = 1024
EXACT = 1e-12


@pytest.mark.parametrize("permutation", ["identity", "auto"])
def test_hadamard_is_recovered(permutation):
    model = ButterflyFit(permutation=permutation).fit(hadamard(N).astype(float))
    assert model.reconstruction_err_ < EXACT
    assert model.nnz_ == 2 * N * 10


@pytest.mark.parametrize("permutation", ["bit_reversal", "auto"])
@pytest.mark.parametrize("size", [N, 360])
def test_fourier_transform_is_recovered(permutation, size):
    model = ButterflyFit(permutation=permutation).fit(np.fft.fft(np.eye(size)))
    assert model.reconstruction_err_ < EXACT


def test_a_given_permutation_is_used():
    order = np.array([int(f"{i:06b}"[::-1], 2) for i in range(64)])
    model = ButterflyFit(permutation=order).fit(np.fft.fft(np.eye(64)))
    assert model.reconstruction_err_ < EXACT


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("kind", ["hadamard", "fourier", "random"])
def test_an_order_of_the_columns_is_learned(kind, noise):
    rng = np.random.default_rng(0)
    W = {
        "hadamard": lambda: hadamard(64).astype(float),
        "fourier": lambda: np.fft.fft(np.eye(64)),
        "random": lambda: ButterflyFit().fit(rng.standard_normal((64, 64))).operator_.toarray(),
    }[kind]()[:, rng.permutation(64)]
    E = rng.standard_normal(W.shape)
    noisy = W + noise * np.linalg.norm(W) / np.linalg.norm(E) * E
    model = ButterflyFit(permutation="learned").fit(noisy)
    assert model.nnz_ == 2 * 64 * 6
    assert model.reconstruction_err_ <= noise + EXACT
    assert ButterflyFit(permutation="auto").fit(noisy).reconstruction_err_ > 0.5


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.0, 1.0]), st.booleans())
def test_learning_an_order_never_hurts(rows, columns, spread, is_complex):
    rng = np.random.default_rng(0)
    W = 1 + spread * rng.standard_normal((rows, columns)) + (1j if is_complex else 0)
    learned, plain = (
        ButterflyFit(chain="square_dyadic", permutation=name).fit(W)
        for name in ("learned", "identity")
    )
    assert learned.nnz_ == plain.nnz_
    assert learned.reconstruction_err_ <= plain.reconstruction_err_ * 1.01 + EXACT


def cosine(transform, kind):
    return transform(np.eye(N), type=kind, axis=0, norm="ortho")


@pytest.mark.parametrize(
    ("W", "permutation"),
    [
        (cosine(scipy.fft.dct, 2), "dct"),
        (cosine(scipy.fft.dct, 2), "auto"),
        (cosine(scipy.fft.dct, 3), "idct"),
        (cosine(scipy.fft.dst, 2), "dct"),
        (cosine(scipy.fft.dst, 3), "auto"),
    ],
)
def test_cosine_and_sine_transforms_are_recovered_with_rank_two(W, permutation):
    model = ButterflyFit(permutation=permutation, rank=2).fit(W)
    assert model.reconstruction_err_ < EXACT
    assert model.density_ < 0.08


@pytest.mark.parametrize("noise", [1e-6, 1e-2, 0.1])
def test_error_of_a_noisy_butterfly_is_below_the_noise(noise):
    rng = np.random.default_rng(0)
    W = hadamard(256) / 256.0
    noisy = W + noise * rng.standard_normal(W.shape) / 256.0
    model = ButterflyFit().fit(noisy)
    assert model.reconstruction_err_ <= noise


@pytest.mark.parametrize("noise", [1e-8, 1e-3, 0.1])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("patterns", [
    [(1, 2, 2, 32), (2, 2, 2, 16), (4, 2, 2, 8), (8, 2, 2, 4), (16, 2, 2, 2), (32, 2, 2, 1)],
    [(1, 3, 4, 20), (4, 4, 2, 5), (8, 5, 6, 1)],
    [(1, 4, 6, 16), (3, 8, 6, 4), (9, 8, 3, 1)],
])  # fmt: skip
def test_a_random_planted_butterfly_is_identified_under_noise(noise, is_complex, patterns):
    rng = np.random.default_rng(0)

    def gaussian(*shape):
        return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)

    planted = FactorProduct(
        [KroneckerSparseFactor(gaussian(a, d, b, c)) for a, b, c, d in patterns]
    )
    W = planted.toarray()
    W = W / np.linalg.norm(W)
    disturbance = gaussian(*W.shape)
    disturbance *= noise / np.linalg.norm(disturbance)
    model = ButterflyFit(chain=patterns).fit(W + disturbance)
    # The fit takes up some of the noise, and what it makes of the rest is of the noise's size.
    assert model.reconstruction_err_ <= noise
    assert np.linalg.norm(model.operator_.toarray() - W) <= 2 * noise


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.1, 1.0),
    st.sampled_from(["auto", "square_dyadic", "monarch"]),
)
def test_density_is_never_exceeded(rows, columns, density, chain):
    W = np.random.default_rng(0).standard_normal((rows, columns))
    try:
        model = ButterflyFit(chain=chain, density=density, permutation="auto").fit(W)
    except ValueError as error:
        assert "density" in str(error)  # noqa: PT017
        return
    assert model.density_ <= density
    assert model.operator_.shape == W.shape
    assert model.reconstruction_err_ <= 1


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["auto", "square_dyadic"]))
def test_without_a_density_any_shape_is_fitted_in_at_most_its_own_values(rows, columns, chain):
    W = np.random.default_rng(0).standard_normal((rows, columns))
    model = ButterflyFit(chain=chain).fit(W)
    assert model.density_ <= 1
    assert model.reconstruction_err_ < 1


@pytest.mark.parametrize("shape", [(64, 64), (30, 48)])
def test_descent_lowers_the_error_of_what_is_identified(shape):
    W = np.random.default_rng(0).standard_normal(shape)
    sweeps = ButterflyFit().fit(W)
    descent = ButterflyFit(method="gradient").fit(W)
    assert descent.patterns_ == sweeps.patterns_
    assert descent.reconstruction_err_ < sweeps.reconstruction_err_
    objective = descent.history_["objective"]
    assert objective[-1] <= objective[0]


def test_descent_keeps_what_is_exact():
    model = ButterflyFit(method="gradient", permutation="bit_reversal").fit(np.fft.fft(np.eye(64)))
    assert model.reconstruction_err_ < EXACT


@pytest.mark.parametrize("shape", [(53, 53), (31, 97), (97, 31), (24, 60)])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_a_chain_is_chosen_for_any_shape_and_field(shape, is_complex, density):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    model = ButterflyFit(density=density, permutation="auto").fit(W)
    assert 0.8 * density < model.density_ <= density
    assert model.operator_.dtype == W.dtype
    # As good as the best approximation of low rank with as many values, and often better.
    rank = int(density * W.size / sum(shape))
    values = np.linalg.svdvals(W)
    assert (
        model.reconstruction_err_ <= np.linalg.norm(values[rank:]) / np.linalg.norm(values) + 1e-9
    )


@pytest.mark.parametrize("is_complex", [False, True])
def test_padding_of_prime_sides_counts_as_stored(is_complex):
    W = np.random.default_rng(0).standard_normal((53, 53)).astype(complex if is_complex else float)
    model = ButterflyFit(chain="square_dyadic").fit(W)
    stored = sum(factor.nnz for factor in model.factors_)
    assert model.nnz_ == stored == sum(np.prod(pattern) for pattern in model.patterns_)
    assert model.patterns_[0][1] * model.patterns_[0][3] > 53


def test_full_density_is_exact():
    W = np.random.default_rng(0).standard_normal((13, 17))
    assert ButterflyFit(density=1.0).fit(W).reconstruction_err_ < EXACT


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (37, 53)])
def test_a_budget_is_used_at_least_as_well_as_by_low_rank(shape):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape) * np.linspace(0.1, 1, shape[1])
    model = ButterflyFit(density=0.25).fit(W)
    assert model.reconstruction_err_ <= LowRank(density=0.25).fit(W).reconstruction_err_ + EXACT


def test_more_density_never_fits_worse():
    W = np.random.default_rng(0).standard_normal((64, 64))
    errors = [ButterflyFit(density=d).fit(W).reconstruction_err_ for d in (0.1, 0.2, 0.4, 0.8)]
    assert errors == sorted(errors, reverse=True)


def test_patterns_can_be_listed():
    patterns = [(1, 4, 8, 4), (4, 8, 4, 1)]
    model = ButterflyFit(chain=patterns).fit(np.random.default_rng(0).standard_normal((16, 16)))
    assert [factor.pattern for factor in model.factors_] == patterns == model.patterns_


def test_a_listed_chain_larger_than_the_matrix_pads_it():
    W = np.random.default_rng(0).standard_normal((13, 10))
    model = ButterflyFit(chain=[(1, 4, 8, 4), (4, 8, 4, 1)]).fit(W)
    assert model.operator_.shape == W.shape
    assert model.nnz_ == 256


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_exact_recovery_holds_in_every_precision(dtype):
    W = np.fft.fft(np.eye(64)) if np.issubdtype(dtype, np.complexfloating) else hadamard(64)
    model = ButterflyFit(permutation="auto").fit(W.astype(dtype))
    assert model.operator_.dtype == dtype
    assert model.reconstruction_err_ < 100 * np.finfo(dtype).eps


def test_fit_is_deterministic():
    W = np.random.default_rng(0).standard_normal((24, 36))
    models = [ButterflyFit(density=0.3, permutation="auto").fit(W) for _ in range(2)]
    assert np.array_equal(*(model.operator_.toarray() for model in models))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1e-3}, "density"),
        ({"chain": "square_dyadic", "density": 0.05}, "density"),
        ({"chain": "square_dyadic", "rank": 2, "density": 0.2}, "density"),
        ({"chain": [(1, 2, 2)]}, "chain must be a name or a list"),
        ({"chain": []}, "chain must be a name or a list"),
        ({"chain": [(1, 16, 16, 1)], "rank": 1}, "rank must be None"),
        ({"chain": [(1, 8, 16, 1)]}, "chain must give a product of at least 16×16"),
        ({"chain": "circulant"}, "chain"),
        ({"rank": 0}, "rank"),
        (
            {"permutation": np.zeros(16, int)},
            "permutation must hold each column index of W, 0 to 15, exactly once",
        ),
        (
            {"permutation": [1, 0]},
            "permutation must hold each column index of W, 0 to 15, exactly once",
        ),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"method": "magic"}, "method"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ButterflyFit(**options).fit(np.eye(16))
