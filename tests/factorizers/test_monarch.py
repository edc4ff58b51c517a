"""MonarchProjector: the exact projection, and never worse than low rank."""

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact import LowRank, MonarchProjector


def brute_force(W, n_blocks, rank):
    """Return the Monarch matrix nearest to `W`, slice by slice of rows and columns."""
    left, right = n_blocks
    W_hat = np.zeros_like(W)
    width = W.shape[1] // right
    for remainder in range(left):
        for block in range(right):
            rows, columns = slice(remainder, None, left), slice(block * width, (block + 1) * width)
            U, s, Vh = np.linalg.svd(W[rows, columns], full_matrices=False)
            W_hat[rows, columns] = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    return W_hat


@pytest.mark.parametrize("n_blocks", [(1, 1), (4, 4), (2, 6), (12, 3), (1, 18)])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_projection_agrees_with_brute_force(n_blocks, rank, dtype):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((24, 36)).astype(dtype)
    if dtype == np.complex128:
        W += 1j * rng.standard_normal(W.shape)
    model = MonarchProjector(n_blocks=n_blocks, rank=rank).fit(W)
    assert np.allclose(model.operator_.toarray(), brute_force(W, n_blocks, rank), atol=1e-12)
    assert (model.n_blocks_, model.rank_) == (n_blocks, rank)


def test_projecting_twice_changes_nothing():
    W = np.random.default_rng(0).standard_normal((30, 20))
    once = MonarchProjector(n_blocks=5, rank=2).fit(W).operator_.toarray()
    assert MonarchProjector(n_blocks=5, rank=2).fit(once).reconstruction_err_ < 1e-13


@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.floats(0.2, 1.0),
    st.integers(0, 5),
    st.sampled_from(["gaussian", "decaying", "low rank", "blocks"]),
)
def test_never_worse_than_low_rank_at_the_same_density(rows, columns, density, seed, kind):
    if density * rows * columns < rows + columns:
        return
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns))
    if kind == "decaying":
        W *= 0.5 ** np.arange(columns)
    elif kind == "low rank":
        W = W[:, :1] @ W[:1]
    elif kind == "blocks":
        W[: rows // 2, columns // 2 :] = W[rows // 2 :, : columns // 2] = 0
    model = MonarchProjector(density=density).fit(W)
    low_rank = LowRank(density=density).fit(W)
    assert model.reconstruction_err_ <= low_rank.reconstruction_err_ + 1e-14
    assert model.nnz_ <= density * W.size


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_blocks_need_not_divide_the_sides(rows, columns, data):
    n_blocks = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns)))
    W = np.random.default_rng(0).standard_normal((rows, columns))
    model = MonarchProjector(n_blocks=n_blocks, rank=1).fit(W)
    assert model.operator_.shape == W.shape
    assert model.n_blocks_ == n_blocks
    assert model.reconstruction_err_ <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 2), (31, 29)])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_matrices_of_any_shape_are_exact(shape, fill):
    model = MonarchProjector().fit(np.full(shape, fill))
    assert model.reconstruction_err_ < 1e-14


def test_a_planted_monarch_matrix_is_found():
    rng = np.random.default_rng(0)
    W = brute_force(rng.standard_normal((64, 64)), (8, 8), 1)
    model = MonarchProjector(density=0.25).fit(W)
    assert model.reconstruction_err_ < 1e-13


@pytest.mark.parametrize(
    ("shape", "n_blocks", "rank"), [((64, 64), (8, 8), 1), ((48, 96), (4, 6), 2)]
)
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_planted_matrix_is_found_behind_permutations(shape, n_blocks, rank, is_complex, noise):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    W = brute_force(W, n_blocks, rank)
    W = W[rng.permutation(shape[0])][:, rng.permutation(shape[1])]
    E = rng.standard_normal(shape)
    noisy = W + noise * np.linalg.norm(W) / np.linalg.norm(E) * E
    plain = MonarchProjector(n_blocks=n_blocks, rank=rank).fit(noisy)
    found = MonarchProjector(n_blocks=n_blocks, rank=rank, permute=True).fit(noisy)
    assert found.nnz_ == plain.nnz_
    assert found.reconstruction_err_ <= noise + 1e-13 < plain.reconstruction_err_


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (31, 29)])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_looking_for_permutations_never_hurts(shape, calibrated, scale):
    W = scale * np.random.default_rng(0).standard_normal(shape)
    X = layer_inputs(shape[1]) if calibrated else None
    plain, found = (
        MonarchProjector(permute=permute).fit(W, calibration=X) for permute in (False, True)
    )
    assert found.density_ <= max(0.25, plain.density_)
    if not calibrated:
        assert found.reconstruction_err_ <= plain.reconstruction_err_ + 1e-12
    assert found.operator_.shape == shape


@pytest.mark.parametrize("kind", ["gaussian", "low rank", "planted"])
def test_estimated_losses_choose_as_well_as_exact_ones(kind, monkeypatch):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((384, 512))
    if kind == "low rank":
        W += 3 * rng.standard_normal((384, 20)) @ rng.standard_normal((20, 512))
    elif kind == "planted":
        W = brute_force(W, (8, 8), 4) + 0.1 * W
    best = MonarchProjector(density=0.25).fit(W)
    monkeypatch.setattr("matfact.factorizers._chain._LARGE", W.size)
    chosen = MonarchProjector(density=0.25).fit(W)
    assert chosen.reconstruction_err_ <= best.reconstruction_err_ * 1.005
    assert chosen.reconstruction_err_ <= LowRank(density=0.25).fit(W).reconstruction_err_ + 1e-12


def test_a_quarter_of_the_values_are_used():
    W = np.random.default_rng(0).standard_normal((128, 128))
    assert MonarchProjector(density=0.25).fit(W).density_ == 0.25


def layer_inputs(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((300, n)) @ (rng.standard_normal((n, n)) * np.linspace(0, 1, n))


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (31, 29)])
@pytest.mark.parametrize("n_blocks", [None, 2, 4])
def test_calibration_inputs_lower_the_error_of_the_outputs(shape, n_blocks):
    W, X = np.random.default_rng(1).standard_normal(shape), layer_inputs(shape[1])
    aware = MonarchProjector(density=0.4, n_blocks=n_blocks).fit(W, calibration=X)
    plain = MonarchProjector(density=0.4, n_blocks=n_blocks).fit(W)
    outputs = X @ W.T
    blind = np.linalg.norm(X @ (W - plain.operator_.toarray()).T) / np.linalg.norm(outputs)
    error = np.linalg.norm(X @ (W - aware.operator_.toarray()).T) / np.linalg.norm(outputs)
    assert aware.layer_err_ == pytest.approx(error)
    assert error < blind
    assert aware.nnz_ <= 0.4 * W.size


@pytest.mark.parametrize("asarray", [torch.asarray, array_api_strict.asarray])
def test_calibrated_fits_agree_between_libraries(asarray):
    W, X = np.random.default_rng(1).standard_normal((20, 24)), layer_inputs(24)
    expected = MonarchProjector(n_blocks=2).fit(W, calibration=X)
    model = MonarchProjector(n_blocks=2).fit(asarray(W), calibration=asarray(X))
    assert model.layer_err_ == pytest.approx(expected.layer_err_)


def test_never_worse_than_low_rank_with_the_same_inputs():
    W, X = np.random.default_rng(1).standard_normal((32, 48)), layer_inputs(48)
    low_rank = LowRank(density=0.3).fit(W, calibration=X)
    model = MonarchProjector(density=0.3).fit(W, calibration=X)
    assert model.layer_err_ <= low_rank.layer_err_ * (1 + 1e-6)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_inputs_of_low_rank_and_dead_columns_are_no_trouble(fill):
    W, X = np.random.default_rng(1).standard_normal((16, 16)), np.zeros((5, 16))
    X[:, :3] = fill
    model = MonarchProjector(density=0.5, n_blocks=4).fit(W, calibration=X)
    assert model.layer_err_ < 1e-6
    assert model.reconstruction_err_ <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.01}, "density"),
        ({"n_blocks": 4, "rank": 4, "density": 0.2}, "density"),
        ({"n_blocks": 17}, "n_blocks must be an int"),
        ({"n_blocks": (4, 4, 4)}, "n_blocks must be an int"),
        ({"n_blocks": (4, 0)}, "n_blocks must be an int"),
        ({"n_blocks": 4, "rank": 5}, "rank must be at most 4"),
        ({"rank": 17}, "rank must be at most 16"),
        ({"rank": 0}, "rank"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MonarchProjector(**options).fit(np.eye(16))
