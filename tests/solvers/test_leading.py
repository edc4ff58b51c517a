"""Leading singular vectors of batches: as good as the singular value decomposition."""

import array_api_strict
import numpy as np
import pytest
import torch

from matfact.solvers.leading import leading_range, leading_vector


def blocks(rows, columns, dtype=np.float64, batch=20):
    rng = np.random.default_rng(rows + columns)
    array = rng.standard_normal((batch, rows, columns))
    if np.issubdtype(dtype, np.complexfloating):
        array = array + 1j * rng.standard_normal(array.shape)
    return array.astype(dtype)


def captured(basis, array):
    return np.linalg.norm(np.conj(np.swapaxes(basis, -1, -2)) @ array) ** 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(2, 50, 1), (8, 8, 1), (30, 9, 1), (40, 40, 1), (2, 50, 2), (9, 12, 4), (12, 9, 4)],
)
def test_as_much_energy_is_captured_as_by_singular_vectors(rows, columns, rank, dtype):
    array = blocks(rows, columns, dtype)
    basis = leading_range(array, rank)
    best = np.sum(np.linalg.svdvals(array.astype(np.complex128))[:, :rank] ** 2)
    assert captured(basis, array) == pytest.approx(best, rel=50 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9, 1e-4, 1.0])
def test_close_singular_values_come_apart(gap):
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    values = np.array([1 + gap, 1.0, 0.5, 0.1, 0.0, 0.0])
    vector = leading_vector(((Q * values) @ Q.T)[None])[0, :, 0]
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-14)
    assert vector @ (Q * values) @ Q.T @ vector == pytest.approx(1 + gap, rel=1e-14)


def test_zero_blocks_among_others_give_zero_vectors():
    array = blocks(4, 5)
    array[::3] = 0
    basis = leading_range(array, 1)
    assert not basis[::3].any()
    assert np.allclose(np.linalg.norm(np.delete(basis, np.s_[::3], axis=0), axis=1), 1)


@pytest.mark.parametrize("library", [torch, array_api_strict])
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (6, 4)])
def test_array_libraries_agree(library, rows, columns):
    array = blocks(rows, columns)
    found = np.asarray(leading_range(library.asarray(array), 1))
    assert captured(found, array) == pytest.approx(captured(leading_range(array, 1), array))
