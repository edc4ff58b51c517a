"""The benchmarks run at tiny size, and measure what they say."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# The benchmarks are not installed with the library.
from benchmarks import butterfly, floor, machine, projection, readers, writers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", "projection", "--quick"]
    command += ["--matrices", "gaussian|Hadamard", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "projection.json").read_text())


def test_every_present_method_is_measured(result):
    _, content = result
    measured = {row["method"] for row in content["rows"] if row["status"] == "ok"}
    absent = {method.name for method in projection.METHODS if not method.is_present()}
    assert set(content["absent"]) == absent
    assert measured | absent == {method.name for method in projection.METHODS}


def test_only_the_published_ties_fail(result):
    failed = {(r["method"], r["matrix"]) for r in result[1]["rows"] if r["status"] == "failed"}
    assert failed <= {("published DSF", "Hadamard 32")}  # its strict thresholds keep no tie


def test_table_and_figure_are_written(result):
    folder, content = result
    table = (folder / "projection.md").read_text()
    assert all(row["method"] in table for row in content["rows"])
    assert (folder / "projection.svg").stat().st_size > 10_000
    assert content["conditions"]["threads"] == 1


def test_no_fit_is_faster_than_the_floor():
    parser = argparse.ArgumentParser()
    floor.add_arguments(parser)
    with machine.threads(1):
        rows = floor.measure(48, parser.parse_args(["--repeats", "1", "--outer", "2"]))
    assert all(row["seconds"] > row["floor"] > 0 for row in rows if "seconds" in row)
    assert {row["method"] for row in rows} == set(floor.METHODS)


def test_every_way_of_writing_is_measured():
    row = writers.measure(3)
    assert row["count"] == 3
    assert min(row["seconds"].values()) > 0


def test_evaluation_counts_factors_but_not_permutations():
    rng = np.random.RandomState(0)
    factors = [
        rng.standard_normal((6, 2)),
        rng.standard_normal((2, 4)),
        np.eye(4, dtype=bool)[::-1],
    ]
    W = factors[0] @ factors[1] @ factors[2]
    measured = projection.evaluate(W, factors)
    assert measured["nnz"] == 20
    assert measured["relative_error"] < 10 * np.finfo(float).eps


def test_published_baseline_meets_its_budget_and_beats_pruning():
    torch = pytest.importorskip("torch")
    from benchmarks.published_dsf import published_dsf

    W = torch.from_numpy(np.random.RandomState(0).standard_normal((96, 48)).astype(np.float32))
    with machine.threads(1):
        *_, (left, right) = published_dsf(W, 0.25)
    measured = projection.evaluate(W.numpy(), [left.numpy(), right.numpy()])
    assert measured["density"] <= 0.25
    assert measured["normalized_error"] < 0.9


def test_peers_that_are_not_installed_are_absent(monkeypatch):
    assert all(method.is_present() for method in projection.OURS)
    monkeypatch.setattr(machine, "version", lambda package: None)
    assert not any(method.is_present() for method in projection.PEERS)
    assert set(machine.describe(1)["peers"].values()) == {None}


def test_butterfly_fits_err_less_than_those_of_peers(tmp_path):
    parser = argparse.ArgumentParser()
    butterfly.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    butterfly.run(parser.parse_args(["--quick", "--output", str(tmp_path)]))
    rows = json.loads((tmp_path / "butterfly.json").read_text())["rows"]
    error = {(row["matrix"], row["method"]): row["error"] for row in rows}
    for (matrix, method), value in error.items():
        if not method.startswith("matfact"):
            assert error[matrix, "matfact"] <= max(value, 16 * np.finfo(float).eps)
    assert "| Hadamard |" in (tmp_path / "butterfly.md").read_text()


def test_layers_are_measured_against_the_dense_one(tmp_path):
    pytest.importorskip("torch")
    from benchmarks import layers

    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    for mode in ([], ["--training"]):
        layers.run(parser.parse_args(["--quick", "--output", str(tmp_path), *mode]))
        rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
        assert {row["layer"] for row in rows} == set(layers.LAYERS)
        assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize("name", readers.READERS)
def test_readers_are_measured(name):
    row = readers.measured(name, 20)
    assert row["tensors"] == 20
    assert row["seconds"] > 0
