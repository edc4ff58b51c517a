"""Rates of a machine, and what is predicted from them."""

import numpy as np
import pytest

from matfact.kernels import cost
from matfact.kernels.program import Program

RATES = {kind: [float(b) for b in cost.BATCHES] for kind in cost.KINDS}


def test_the_fastest_of_rounds_counts_and_rates_that_differ_each_time_are_not_final(monkeypatch):
    for factors, is_final in (([4, 1, 2], False), ([4, 1, 1.1], True)):
        slower = iter(factors)

        def measure(slower=slower):
            factor = next(slower)
            return {kind: [factor * t for t in times] for kind, times in RATES.items()}

        monkeypatch.setattr(cost, "measure", measure)
        assert cost._fastest_rates() == (RATES, is_final)


@pytest.mark.parametrize(
    ("share", "scale", "is_timed"),
    [(0.1, 1.0, False), (1.0, 1.0, True), (10.0, 1.0, False), (0.1, 1e-10, True)],
)
def test_products_are_timed_once_where_the_prediction_is_close(
    share, scale, is_timed, times, monkeypatch
):
    rates = {kind: [0.0] * 6 for kind in cost.KINDS}
    dense = {kind: [scale] * 6 for kind in ("dense", "small dense")}
    parts = {kind: [share * scale * 90] * 6 for kind in ("csr", cost.SHARED["csr"])}
    monkeypatch.setattr(cost, "rates", lambda: rates | dense | parts)
    programs = []
    for seed in range(2):
        programs.append(Program(np.float64, half="", columns=90))
        rng = np.random.default_rng(seed)
        indices, indptr = rng.integers(90, size=90), np.arange(91)
        programs[-1].add_csr(rng.standard_normal(90), indices, indptr)
        programs[-1].finish()
    first, second = [cost.choice_seconds(program, 3) for program in programs]
    assert first == second
    assert min(first) > 0
    assert (first != pytest.approx((2 * share * scale * 90 * 90, 2 * scale * 90 * 90))) == is_timed
    assert times.exists() == is_timed
    X = rng.standard_normal((90, 3))
    np.testing.assert_array_equal(programs[1].copy().apply(X), programs[1].apply(X))


def test_numbers_of_parts_are_compared_by_three_bits():
    assert [cost._rounded(n) for n in (0, 1, 7, 8, 9, 17, 1000, 1025)] == [
        0, 1, 7, 8, 10, 20, 1024, 1280
    ]  # fmt: skip


def test_times_are_interpolated_and_proportional_beyond_what_was_measured():
    largest = cost.BATCHES[-1]
    assert cost.dense_seconds(RATES, 2, 40) == pytest.approx(80)
    counts = {"csr": 1, "row": 2}
    assert cost.program_seconds(RATES, counts, 2 * largest, 1) == pytest.approx(6 * largest)


def test_times_depend_on_threads_and_on_the_size_of_a_dense_matrix():
    rates = RATES | {"shared csr": [0.5] * 6, "dense": [1.0] * 6, "small dense": [3.0] * 6}
    assert cost.program_seconds(rates, {"csr": 4}, 1, threads=1) == pytest.approx(4)
    assert cost.program_seconds(rates, {"csr": 4}, 1, threads=2) == pytest.approx(2)
    per_entry = [cost.dense_seconds(rates, n * n, 1) / n**2 for n in (128, 512, 2048)]
    assert per_entry == pytest.approx([3, 2, 1])


def test_measured_rates_are_finite_and_take_no_negative_time(monkeypatch):
    monkeypatch.setattr(cost, "_SIDE", 64)
    monkeypatch.setattr(cost, "_SMALL", 32)
    monkeypatch.setattr(cost, "_LAYERS", 2)
    rates = cost.measure()
    assert set(rates) == set(cost.KINDS)
    assert all(np.isfinite(rates[kind]).all() and min(rates[kind]) >= 0 for kind in rates)
    assert min(rates["dense"] + rates["small dense"] + rates["call"]) > 0
