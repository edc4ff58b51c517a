"""Identification of butterfly factors: exact recovery, quasi-optimality, descent."""

import math

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from matfact.operators import FactorProduct, KroneckerSparseFactor
from matfact.solvers._callback import History
from matfact.solvers.butterfly import butterfly
from matfact.solvers.chains import (
    Chain,
    digit_reversal,
    dyadic_chain,
    grouped_chain,
    two_factor_chain,
    two_factor_chains,
)
from matfact.solvers.monarch import monarch, monarch_loss


def dense(values):
    return FactorProduct([KroneckerSparseFactor(array) for array in values]).toarray()


def planted(chain, seed=0, dtype=np.float64):
    """Return a random product with the supports of `chain`, of unit norm."""
    rng = np.random.default_rng(seed)
    W = dense([rng.standard_normal((a, d, b, c)).astype(dtype) for a, b, c, d in chain.patterns])
    return W / np.linalg.norm(W)


def solve(W, chain, **options):
    history = History()
    values, _ = butterfly(W, chain, callback=history, **options)
    return values, history.objective


@st.composite
def chains(draw):
    n_factors = draw(st.integers(1, 4))
    radices = st.lists(st.integers(1, 3), min_size=n_factors, max_size=n_factors).map(tuple)
    chain = Chain(draw(radices), draw(radices), (1,) * (n_factors - 1))
    return chain.with_rank(draw(st.integers(1, 3)))


@settings(deadline=None, max_examples=25)
@given(chains(), st.integers(0, 100))
def test_planted_products_are_recovered(chain, seed):
    W = planted(chain, seed)
    values, _ = solve(W, chain)
    assert np.linalg.norm(W - dense(values)) < 1e-12


@settings(deadline=None, max_examples=25)
@given(chains())
def test_factors_have_the_patterns_of_the_chain(chain):
    values, _ = solve(planted(chain), chain)
    factors = [KroneckerSparseFactor(array) for array in values]
    assert [factor.pattern for factor in factors] == chain.patterns
    assert FactorProduct(factors).nnz == chain.nnz
    assert FactorProduct(factors).shape == chain.shape


@settings(deadline=None, max_examples=25)
@given(chains(), st.integers(1, 6))
def test_chains_are_read_back_from_their_patterns(chain, rank):
    chain = chain.with_rank(rank)
    assert Chain.from_patterns(chain.patterns) == chain


@settings(deadline=None, max_examples=25)
@given(chains(), st.integers(1, 400))
def test_largest_rank_within_a_budget(chain, budget):
    fitting = chain.within(budget)
    if fitting is None:
        assert chain.with_rank(1).nnz > budget
    else:
        larger = chain.with_rank(max(fitting.ranks, default=1) + 1)
        assert fitting.nnz <= budget
        assert larger == fitting or larger.nnz > budget


@pytest.mark.parametrize(
    "patterns",
    [
        [(1, 2, 2, 2), (2, 2, 2, 2)],  # the last d is not 1
        [(2, 2, 2, 1)],  # the first a is not 1
        [(1, 4, 4, 3), (4, 2, 2, 2), (8, 2, 2, 1)],  # d of the first no multiple of the second's
        [(1, 2, 4, 2), (2, 2, 2, 1)],  # columns of the first are not the rows of the second
        [(1, 2, 6, 2), (2, 6, 2, 1)],  # rank 3 where blocks have two rows
    ],
)
def test_patterns_that_do_not_chain_are_refused(patterns):
    with pytest.raises(ValueError, match="chain must list patterns"):
        Chain.from_patterns(patterns)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_noise_is_not_amplified(dtype):
    chain = dyadic_chain((128, 128))
    W = planted(chain, dtype=dtype)
    noise = planted(two_factor_chain((128, 128), (1, 1)).with_rank(128), seed=1, dtype=dtype)
    values, _ = solve(W + 0.1 * noise, chain)
    # The best product is at least as near as the planted one.
    assert np.linalg.norm(W + 0.1 * noise - dense(values)) < 0.1


def test_identification_is_quasi_optimal_without_sweeps():
    chain = dyadic_chain((64, 64))
    W = planted(chain) + 1e-2 * planted(two_factor_chain((64, 64), (1, 1)).with_rank(64), seed=1)
    values, _ = solve(W, chain, max_iter=0)
    assert np.linalg.norm(W - dense(values)) <= 1e-2 * math.sqrt(len(values) - 1)


@pytest.mark.parametrize("rank", [1, 2])
def test_objective_is_the_squared_error_and_descends(rank):
    W = np.random.default_rng(0).standard_normal((48, 64))
    chain = dyadic_chain(W.shape).with_rank(rank)
    values, objective = solve(W, chain, tol=0.0)
    assert objective == sorted(objective, reverse=True)
    assert objective[-1] == pytest.approx(np.linalg.norm(W - dense(values)) ** 2, rel=1e-12)


def test_sweeps_lower_the_error():
    W = np.random.default_rng(0).standard_normal((128, 128))
    _, objective = solve(W, dyadic_chain(W.shape))
    # The identification alone leaves over 0.98 of the energy; the sweeps add a third to the rest.
    energy = np.linalg.norm(W) ** 2
    assert energy - objective[-1] > 1.2 * (energy - objective[0])


def test_last_digit_reversal_is_the_bit_reversal():
    expected = [int(f"{i:05b}"[::-1], 2) for i in range(32)]
    assert digit_reversal((2,) * 5).tolist() == expected


def test_identification_of_a_zero_matrix_is_zero():
    values, _ = solve(np.zeros((16, 8)), dyadic_chain((16, 8)).with_rank(2))
    assert not np.any(dense(values))


@pytest.mark.parametrize("library", [torch, array_api_strict])
@pytest.mark.parametrize("rank", [1, 2])
def test_array_libraries_agree(library, rank):
    W = np.random.default_rng(0).standard_normal((24, 32))
    chain = dyadic_chain(W.shape).with_rank(rank)
    expected, _ = solve(W, chain)
    values, _ = solve(library.asarray(W), chain)
    assert np.allclose(np.asarray(dense(values)), dense(expected), atol=1e-10)


def test_input_is_left_alone():
    W = hadamard(16).astype(float)
    W.flags.writeable = False
    solve(W, dyadic_chain(W.shape))
    monarch(W, two_factor_chain(W.shape, (4, 4)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 7), (48, 20)])
def test_candidate_chains_cover_the_shape_and_begin_with_low_rank(shape):
    candidates = two_factor_chains(shape)
    assert candidates[0].with_rank(1).nnz == sum(shape)
    for chain in [*candidates, dyadic_chain(shape), grouped_chain(shape, 3)]:
        assert chain.shape[0] >= shape[0]
        assert chain.shape[1] >= shape[1]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_monarch_loss_is_the_squared_error(left, right, rank, is_complex):
    rng = np.random.default_rng(left + 10 * right)
    W = rng.standard_normal((4 * left, 3 * right)) * (1j if is_complex else 1)
    chain = two_factor_chain(W.shape, (left, right)).with_rank(rank)
    error = np.linalg.norm(W - dense(monarch(W, chain))) ** 2
    assert monarch_loss(W, chain) == pytest.approx(error, abs=1e-12 * np.linalg.norm(W) ** 2)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(2, 6),
    st.sampled_from([np.float32, np.float64, np.complex64, np.complex128]),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_compiled_passes_agree_with_those_of_other_libraries(levels, dtype, n_sweeps, seed):
    rng, n = np.random.default_rng(seed), 2**levels
    W = rng.standard_normal((2, n, n))
    W = (W[0] + 1j * W[1] if np.issubdtype(dtype, np.complexfloating) else W[0]).astype(dtype)
    W[:, : seed % n] = 0
    chain = Chain((2,) * levels, (2,) * levels, (1,) * (levels - 1))
    found, objective = solve(W, chain, max_iter=n_sweeps, tol=0.0)
    expected, reference = solve(torch.asarray(W), chain, max_iter=n_sweeps, tol=0.0)
    eps = float(np.finfo(dtype).eps)
    assert [v.shape for v in found] == [tuple(v.shape) for v in expected]
    assert objective[-1] == pytest.approx(reference[-1], rel=1e4 * eps, abs=1e3 * eps * n)
    assert all(v.dtype == dtype for v in found)
    # What the history says is what the factors reach.
    error = np.linalg.norm(W - dense(found)) ** 2
    assert error == pytest.approx(objective[-1], rel=1e4 * eps, abs=1e3 * eps * n * n)
