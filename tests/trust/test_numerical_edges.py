"""Every factorizer on matrices at the limits of floating-point numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from matfact import BlockSVD, MonarchProjector, backend
from matfact.operators import DenseFactor, FactorProduct
from tests.conformance.estimators import FACTORIZERS

SIDE = 20
N_VALUES = SIDE * SIDE // 2

rng = np.random.RandomState(0)
GAUSSIAN = rng.standard_normal((SIDE, SIDE))
EDGES = {
    "subnormal": (GAUSSIAN * 1e-41).astype(np.float32),
    "tiny": (GAUSSIAN * 1e-30).astype(np.float32),
    "huge": (GAUSSIAN * 1e30).astype(np.float32),
    "of all scales": GAUSSIAN * 10.0 ** rng.randint(-30, 31, (SIDE, SIDE)),
    "duplicated columns": GAUSSIAN[:, [0, 1, 2, 3] * (SIDE // 4)],
    "nearly duplicated columns": GAUSSIAN[:, [0] * SIDE] + 1e-15 * GAUSSIAN,
    "zero columns": GAUSSIAN * (np.arange(SIDE) % 3 == 0),
    "zero rows": GAUSSIAN * (np.arange(SIDE) % 3 == 0)[:, None],
    "of low rank": GAUSSIAN[:, :3] @ GAUSSIAN[:3],
    "tied": np.sign(GAUSSIAN),
    "negative zeros": -np.abs(np.sign(GAUSSIAN) * (np.abs(GAUSSIAN) > 1)),
    "the identity": np.eye(SIDE),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", FACTORIZERS)
def test_fits_are_finite_within_budget_and_no_worse_than_nothing(name, edge):
    W = EDGES[edge]
    model = clone(FACTORIZERS[name]).set_params(density=0.5).fit(W)
    assert model.nnz_ <= N_VALUES
    assert model.operator_.dtype == W.dtype
    W_hat = model.operator_.toarray().astype(np.float64)
    assert np.isfinite(W_hat).all()
    # Subnormal results are rounded to a few digits.
    slack = 1e-2 if edge == "subnormal" else 1e2 * float(np.finfo(W.dtype).eps)
    assert model.reconstruction_err_ <= 1 + slack
    scale = np.abs(W).max()
    error = np.linalg.norm((W - W_hat) / scale) / np.linalg.norm(W / np.float64(scale))
    assert error == pytest.approx(model.reconstruction_err_, rel=1e-4, abs=slack)


@pytest.mark.parametrize("edge", ["subnormal", "tiny", "huge"])
@pytest.mark.parametrize("name", FACTORIZERS)
def test_results_scale_with_the_matrix(name, edge):
    usual = clone(FACTORIZERS[name]).set_params(density=0.5).fit(GAUSSIAN.astype(np.float32))
    model = clone(FACTORIZERS[name]).set_params(density=0.5).fit(EDGES[edge])
    assert model.reconstruction_err_ == pytest.approx(usual.reconstruction_err_, rel=0.05)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 24),
    rank=st.integers(1, 3),
    exponent=st.integers(-30, 30),
)
def test_a_matrix_of_low_rank_is_found_exactly(rows, columns, rank, exponent):
    draw = np.random.RandomState(rank)
    W = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, columns))
    model = clone(FACTORIZERS["lowrank"]).set_params(rank=min(rank, rows, columns))
    error = model.fit(W * 10.0**exponent).reconstruction_err_
    assert error <= 1e3 * np.finfo(float).eps


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_ties_do_not_exceed_the_budget(data):
    name = data.draw(st.sampled_from(sorted(FACTORIZERS)))
    levels = data.draw(st.integers(1, 3))
    W = np.round(GAUSSIAN * levels) / levels
    density = data.draw(st.floats(0.3, 1))
    model = clone(FACTORIZERS[name]).set_params(density=density).fit(W)
    assert model.density_ <= density
    again = clone(FACTORIZERS[name]).set_params(density=density).fit(W)
    np.testing.assert_array_equal(model.operator_.toarray(), again.operator_.toarray())


LARGEST = {
    "alternating": np.where((np.arange(SIDE)[:, None] + np.arange(SIDE)) % 2, -1.0, 1.0),
    "but for one": np.where(np.eye(SIDE) * np.arange(SIDE) == 1, 1e-3, 1.0),
    "random": np.clip(GAUSSIAN, -1, 1),
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("name", FACTORIZERS)
def test_results_beyond_the_range_of_a_dtype_are_refused(name, kind, dtype):
    W = LARGEST[kind].astype(dtype) * np.finfo(dtype).max
    model = clone(FACTORIZERS[name]).set_params(density=0.5)
    part = clone(model).fit(W / 8)
    assert np.isfinite(part.operator_.toarray()).all()
    message = None
    try:
        model.fit(W)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert np.isfinite(model.operator_.toarray()).all()
        assert model.reconstruction_err_ == pytest.approx(part.reconstruction_err_, rel=1e-3)
    else:
        assert message.startswith("W must be smaller: its approximation exceeds")
        assert not hasattr(model, "operator_")


def test_complex_numbers_at_the_largest_are_measured_by_their_parts():
    assert backend.unit(np.full(2, np.finfo(float).max * (1 + 1j))) == 2.0**1023
    assert backend.unit(np.array([np.nextafter(2.0, 0)])) == 1.0


def test_calibration_inputs_whose_squares_vanish_are_refused():
    X = np.full((4, SIDE), 1e-200)
    with pytest.raises(ValueError, match="calibration must hold inputs of at least 1e-140"):
        clone(FACTORIZERS["admm"]).fit(GAUSSIAN, calibration=X)
    model = clone(FACTORIZERS["admm"]).fit(GAUSSIAN, calibration=1e-139 * GAUSSIAN)
    usual = clone(FACTORIZERS["admm"]).fit(GAUSSIAN, calibration=GAUSSIAN)
    assert model.layer_err_ == pytest.approx(usual.layer_err_, rel=1e-6)
    assert model.layer_err_ > 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_products_with_a_side_of_0_describe_themselves(shape):
    product = FactorProduct([DenseFactor(np.zeros(shape))])
    assert f"{shape[0]}×{shape[1]}, 0.0%" in repr(product)
    assert f"{shape[0]}×{shape[1]}" in product._repr_html_()
    assert (product.density, product.flops_ratio) == (0.0, 0.0)
    assert (product @ np.zeros((shape[1], 2))).shape == (shape[0], 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("noise", [0, 1e-15, 1e-7])
@pytest.mark.filterwarnings("error")
def test_repeated_rows_are_permuted_without_warnings_of_others(noise, dtype):
    repeated = np.repeat(GAUSSIAN[:4, :16], 4, axis=0) * (1 + noise * GAUSSIAN[:16, :16])
    for W in (repeated, np.ones((16, 16)), repeated[:, [0] * 16]):
        for factorizer in (BlockSVD(permute=True, blocking=(4, 4)), MonarchProjector(permute=True)):
            assert factorizer.fit(W.astype(dtype)).reconstruction_err_ <= 1
