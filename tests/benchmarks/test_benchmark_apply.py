"""The benchmark of applied products runs at tiny size, and checks what it compares."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# The benchmarks are not installed with the library.
from benchmarks import applied, apply

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apply")
    command = [sys.executable, "-m", "benchmarks", "apply", "--quick", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "apply.md").read_text(), json.loads((folder / "apply.json").read_text())


def test_every_structure_is_applied_by_every_present_method(result):
    table, content = result
    measured = {(row["structure"], row["method"]) for row in content["rows"]}
    assert measured == {
        (structure, method.name)
        for structure in applied.STRUCTURES
        for method in applied.METHODS
        if method.is_present() and method.suits(structure)
    }
    assert all(name in table for pair in measured for name in pair)
    assert all(row["ratio"] == 1 for row in content["rows"] if row["method"] == "dense (BLAS)")


def test_break_even_is_advised_for_every_density_and_batch(result):
    _, content = result
    cells = {(row["stored"], row["batch_size"]) for row in content["break_even"]}
    assert len(cells) == len(content["break_even"]) == len(apply.DENSITIES) * 2


def test_a_method_that_applies_something_else_is_noticed():
    product = applied.monarch(64, np.random.RandomState(0))
    wrong = applied.Method("wrong", lambda product, matrix: np.negative)
    X = np.ones((64, 2), np.float32)
    with pytest.raises(AssertionError, match="wrong is off"):
        apply.check({"wrong": [np.negative]}, [wrong], product, X)
