"""Rates of a machine: measured once, kept where that is possible."""

import json

import numpy as np
import pytest

from matfact.kernels import cost
from matfact.kernels.program import Program

RATES = {kind: [float(b) for b in cost.BATCHES] for kind in cost.KINDS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, and a count of measurements."""
    measured = []

    def measure():
        measured.append(1)
        return RATES

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(cost, "_is_busy", lambda: False)
    monkeypatch.setattr(cost, "_cache_folder", lambda: tmp_path / "new")
    cost.rates.cache_clear()
    yield tmp_path / "new", measured
    cost.rates.cache_clear()


def test_rates_are_measured_once_for_all_processes(cache):
    folder, measured = cache
    assert cost.rates() == RATES
    cost.rates.cache_clear()  # as in another process
    assert cost.rates() == RATES
    assert len(measured) == cost._ROUNDS
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"dense": [1]}', "\x00"])
def test_damaged_files_are_measured_anew(cache, content):
    folder, measured = cache
    cost.rates()
    (path,) = folder.iterdir()
    path.write_text(content)
    cost.rates.cache_clear()
    assert cost.rates() == RATES
    assert len(measured) == 2 * cost._ROUNDS
    assert json.loads(path.read_text()) == RATES


def test_a_folder_that_cannot_be_written_is_no_failure(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cost, "_cache_folder", lambda: tmp_path / "file" / "matfact")
    assert cost.rates() == RATES


def test_rates_of_a_busy_machine_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(cost, "_is_busy", lambda: True)
    assert cost.rates() == RATES
    assert not cache[0].exists()


def test_the_fastest_round_counts_and_rates_that_differ_each_time_are_not_kept(cache, monkeypatch):
    slower = iter([4, 1, 2])

    def measure():
        factor = next(slower)
        return {kind: [factor * t for t in times] for kind, times in RATES.items()}

    monkeypatch.setattr(cost, "measure", measure)
    assert cost.rates() == RATES
    assert not cache[0].exists()


@pytest.mark.parametrize(("share", "is_timed"), [(0.1, False), (1.0, True), (10.0, False)])
def test_products_are_timed_once_where_the_prediction_is_close(share, is_timed, monkeypatch):
    rates = {kind: [0.0] * 6 for kind in cost.KINDS}
    dense = {kind: [1.0] * 6 for kind in ("dense", "small dense")}
    parts = {kind: [share * 90] * 6 for kind in ("csr", cost.SHARED["csr"])}
    monkeypatch.setattr(cost, "rates", lambda: rates | dense | parts)
    monkeypatch.setattr(cost, "_timed", {})
    programs = []
    for seed in range(2):
        programs.append(Program(np.float64, half="", columns=90))
        rng = np.random.default_rng(seed)
        indices, indptr = rng.integers(90, size=90), np.arange(91)
        programs[-1].add_csr(rng.standard_normal(90), indices, indptr)
        programs[-1].finish()
    times = [cost.choice_seconds(program, 3) for program in programs]
    assert times[0] == times[1]
    assert min(times[0]) > 0
    assert (times[0] != pytest.approx((share * 90 * 90, 90 * 90))) == is_timed
    X = rng.standard_normal((90, 3))
    np.testing.assert_array_equal(programs[1].copy().apply(X), programs[1].apply(X))


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
