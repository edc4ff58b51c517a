"""Studies resume after interruptions, average over seeds, and have a quick version."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

# The benchmarks are not installed with the library.
from benchmarks import harness, study
from benchmarks.tables import markdown_table

ROOT = Path(__file__).parents[2]


def toy(fails_at=()):
    """Return a study of powers, and the list of cells that it has run."""
    calls = []

    def run(cell):
        calls.append(cell)
        if cell["power"] in fails_at:
            raise ArithmeticError("no such power")
        return {"value": (2 + cell.get("seed", 0)) ** cell["power"], "parts": {"a": cell["seed"]}}

    def table(rows):
        return markdown_table(["power", "value"], [(r["power"], f"{r['value']:.1f}") for r in rows])

    def cells(quick):
        return [{"power": power} for power in ((1,) if quick else (1, 2, 3))]

    module = SimpleNamespace(
        SEEDS=2, cells=cells, run=run, table=table, figure=lambda rows: Figure()
    )
    return module, calls


def run_toy(monkeypatch, folder, module, **options):
    monkeypatch.setattr(study, "load", lambda name: module)
    defaults = {
        "name": "toy", "output": folder, "quick": False, "seeds": None, "cells": "", "n_jobs": 1,
        "report": False, "threads": 1,
    }  # fmt: skip
    return study.run(argparse.Namespace(**{**defaults, **options}))


def test_finished_cells_are_not_run_again(monkeypatch, tmp_path):
    module, calls = toy()
    assert run_toy(monkeypatch, tmp_path, module) == 0
    assert len(calls) == 6
    assert run_toy(monkeypatch, tmp_path, module) == 0
    assert len(calls) == 6
    assert run_toy(monkeypatch, tmp_path, module, seeds=3) == 0
    assert calls[6:] == [{"power": power, "seed": 2} for power in (1, 2, 3)]


def test_failed_and_torn_cells_are_run_again(monkeypatch, tmp_path, capsys):
    module, _ = toy(fails_at=(2,))
    assert run_toy(monkeypatch, tmp_path, module, seeds=1) == 1
    assert "ArithmeticError" in capsys.readouterr().out
    file = tmp_path / "cells.jsonl"
    file.write_text(file.read_text()[:-20])  # as if it was killed while the last line was written
    module, calls = toy()
    assert run_toy(monkeypatch, tmp_path, module, seeds=1) == 0
    assert [cell["power"] for cell in calls] == [2, 3]
    assert len(harness.load(file)) == 3
    assert file.read_text().count("\n") == 4


def test_results_are_averaged_over_seeds(monkeypatch, tmp_path):
    run_toy(monkeypatch, tmp_path, toy()[0])
    table = (tmp_path / "table.md").read_text()
    assert "| 2 | 6.5 ± 3.5 |" in table  # of 4 and 9
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seeds"] == [0, 1]
    assert content["conditions"]["threads"] == 1
    assert content["rows"][1]["results"]["value"] == {
        "mean": 6.5, "deviation": pytest.approx(12.5**0.5), "count": 2,
    }  # fmt: skip
    assert content["rows"][1]["results"]["parts"]["a"]["mean"] == 0.5
    assert (tmp_path / "figure.svg").exists()


def test_cells_are_chosen_and_reported_as_far_as_they_are(monkeypatch, tmp_path):
    module, calls = toy()
    run_toy(monkeypatch, tmp_path, module, cells='"power": [13], "seed": 0')
    run_toy(monkeypatch, tmp_path, module, report=True)
    assert [cell["power"] for cell in calls] == [1, 3]
    assert "| 3 | 8.0 |" in (tmp_path / "table.md").read_text()


def test_a_seed_of_a_cells_own_is_the_only_one():
    cells = harness.with_seeds([{"a": 1}, {"a": 2, "seed": 7}], 2)
    assert cells == [{"a": 2, "seed": 7}, {"a": 1, "seed": 0}, {"a": 1, "seed": 1}]


def test_unknown_names_are_refused():
    command = [sys.executable, "-m", "benchmarks", "study", "alchemy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "alchemy" in done.stderr


@pytest.mark.parametrize("name", study.NAMES)
def test_quick_form_runs(name, tmp_path, monkeypatch):
    options = {"name": name, "output": tmp_path, "quick": True}
    module = study.load(name)
    assert run_toy(monkeypatch, tmp_path, module, **options) == 0
    expected = {"cells.jsonl", "results.json", "table.md", "figure.svg"}
    assert {file.name for file in tmp_path.iterdir()} >= expected
    assert (tmp_path / "figure.svg").stat().st_size > 5_000
