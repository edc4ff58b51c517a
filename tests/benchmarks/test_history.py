"""The history of figures: one file a version, and what changed."""

import json

import matfact
from benchmarks import history


def test_the_current_version_has_its_figures():
    content = json.loads((history.FOLDER / f"{matfact.__version__}.json").read_text())
    assert content["machine"]["versions"]["matfact"] == matfact.__version__
    assert {f"error of {name}" for name in history.ERRORS} <= set(content["figures"])


def test_changes_are_those_since_the_version_before(tmp_path):
    for version, figures in {
        "0.9.0": {"error": 0.5},
        "0.10.0": {"error": 0.4, "time": 2.0},
        "0.11.0": {"error": 0.1},
    }.items():
        (tmp_path / f"{version}.json").write_text(json.dumps({"figures": figures}))
    table = history.changes(tmp_path, "0.10.0")
    assert "| error | 0.5 | 0.4 | 0.8 |" in table
    assert "| time | – | 2 | – |" in table
    assert "| error | – | 0.5 | – |" in history.changes(tmp_path, "0.9.0")
