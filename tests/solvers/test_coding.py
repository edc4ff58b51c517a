"""Encoding of rows with given factors is close to optimal."""

import numpy as np
import pytest

from matfact import DoubleSparseFactorizer
from matfact.operators import DenseFactor, FactorProduct, SelectionFactor, SparseFactor
from matfact.solvers.coding import coding_error


@pytest.mark.parametrize("dtype", [float, complex])
def test_sparse_combinations_of_atoms_are_found_again(dtype):
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((24, 32)) + (
        1j * rng.standard_normal((24, 32)) if dtype is complex else 0
    )
    code = np.where(rng.random((40, 24)) < 0.12, rng.standard_normal((40, 24)), 0).astype(dtype)
    first = SparseFactor.from_dense(np.resize(code, (80, 24)))
    product = FactorProduct([first, DenseFactor(atoms)])
    assert coding_error(code @ atoms, product) < 0.05
    assert coding_error(1e300 * (code[:5] @ atoms), product) < 0.5


def test_rows_that_were_fitted_are_coded_about_as_well():
    W = np.random.default_rng(0).standard_normal((32, 32))
    model = DoubleSparseFactorizer(density=0.4).fit(W)
    assert coding_error(W, model.operator_) == pytest.approx(model.reconstruction_err_, rel=0.05)


def test_products_that_store_nothing_represent_nothing():
    W = np.ones((3, 4))
    swap = FactorProduct([SelectionFactor.from_index([1, 0], 4, like=W)])
    assert coding_error(W, swap) == 1.0
    empty = FactorProduct([DenseFactor(np.ones((3, 0))), DenseFactor(np.ones((0, 4)))])
    assert coding_error(W, empty) == 1.0
    assert coding_error(np.zeros((3, 4)), FactorProduct([DenseFactor(W)])) == 0.0
