"""The benchmarks run at tiny size, and measure what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are not installed with the library

from benchmarks import projection


def run(name, folder):
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return folder, run("projection", folder)


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
    assert (folder / "projection.png").stat().st_size > 10_000
    assert content["conditions"]["threads"] == 1


def test_floor_counts_and_times(tmp_path):
    rows = run("floor", tmp_path)["rows"]
    assert all(row["seconds"] > row["floor"] > 0 for row in rows if "seconds" in row)


def test_evaluation_counts_factors_but_not_permutations():
    rng = np.random.RandomState(0)
    factors = [rng.standard_normal((6, 2)), rng.standard_normal((2, 4)), np.eye(4)[::-1]]
    W = factors[0] @ factors[1] @ factors[2]
    measured = projection.evaluate(W, factors)
    assert measured["nnz"] == 20
    assert measured["relative_error"] < 10 * np.finfo(float).eps


def test_published_baseline_meets_its_budget_and_beats_pruning():
    torch = pytest.importorskip("torch")
    from benchmarks.published_dsf import published_dsf

    W = torch.from_numpy(np.random.RandomState(0).standard_normal((96, 48)).astype(np.float32))
    *_, (left, right) = published_dsf(W, 0.25)
    measured = projection.evaluate(W.numpy(), [left.numpy(), right.numpy()])
    assert measured["density"] <= 0.25
    assert measured["normalized_error"] < 0.9
