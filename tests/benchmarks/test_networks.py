"""Data sets, architectures and training of the benchmarks on whole networks."""

import gzip

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# The benchmarks are not installed with the library.
from benchmarks import harness  # noqa: E402
from benchmarks.networks import allocation, cnn, data, prose, training  # noqa: E402
from benchmarks.networks.models import build  # noqa: E402


def test_idx_files_are_read_and_others_refused(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = b"\x00\x00\x08\x03" + np.array(values.shape, ">u4").tobytes()
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(header + values.tobytes()))
    np.testing.assert_array_equal(data.read_idx(path), values)
    path.write_bytes(gzip.compress(b"\x00\x00\x0d" + header[3:] + values.tobytes()))
    with pytest.raises(ValueError, match="idx"):
        data.read_idx(path)


def test_digits_are_centred_and_held_out_in_equal_shares():
    train_x, train_y, test_x, test_y = data.load("digits")
    assert (train_x.shape[1:], len(train_x) + len(test_x)) == ((1, 8, 8), 1797)
    assert abs(float(train_x.mean())) < 1e-3
    counts = torch.bincount(test_y)
    assert counts.max() - counts.min() <= 3
    assert len(train_y.unique()) == 10


def test_data_that_is_not_there_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFACT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="MATFACT_DATA"):
        data.load("mnist")
    with pytest.raises(ValueError, match="name must be one of"):
        data.load("cifar")


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", ["lenet", "mlp", "vgg", "resnet20", "mobile"])
def test_every_architecture_takes_small_and_large_images(name, size):
    logits = build(name, image_size=size, width=6)(torch.zeros(2, 1, size, size))
    assert logits.shape == (2, 10)


def test_networks_are_trained_once_for_each_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFACT_CACHE", str(tmp_path))
    first = training.trained("mlp", "digits", width=16, epochs=1)
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    file.unlink()
    training.trained("mlp", "digits", width=16, epochs=1)
    assert file.read_bytes() == kept
    calls = []
    monkeypatch.setattr(training, "train", lambda *args, **options: calls.append(options))
    again = training.trained("mlp", "digits", width=16, epochs=1)
    assert calls == []
    x = data.load("digits")[2]
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)
    training.trained("mlp", "digits", width=16, epochs=2)
    assert [options["epochs"] for options in calls] == [2]


def test_batches_are_shuffled_anew_and_alike_for_the_same_seed():
    x, y = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10)
    batches = training.Shuffled(x, y, 4, seed=0)
    first, second = ([label for _, labels in batches for label in labels.tolist()] for _ in "ab")
    assert len(batches) == 3
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    again = training.Shuffled(x, y, 4, seed=0)
    assert [label for _, labels in again for label in labels.tolist()] == first


def test_every_method_stores_no_more_than_its_density_and_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFACT_CACHE", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(cnn, "NETWORKS", ())  # the quick form needs no other data
    folder = tmp_path / "results"
    folder.mkdir()
    assert cnn.run(quick=True, folder=folder) == 0
    rows = {
        row.cell["method"]: row
        for row in harness.rows(harness.load(folder / "cells.jsonl").values())
    }
    assert set(rows) == {"dense", *cnn.METHODS, *cnn.GRADUAL}
    dense = rows.pop("dense")
    assert dense["accuracy"].mean > 0.95
    ends = 16 * 9 + 256 * 10  # the first and the last layer, which are kept
    limit = ends + 0.2 * (dense["values"].mean - ends)
    assert all(row["values"].mean <= limit < row["values"].mean / 0.8 for row in rows.values())
    assert all(row["fine_tuned"].mean > 0.5 for row in rows.values())
    assert "batch norm re-estimated" in (folder / "table.md").read_text()


def test_paragraphs_of_prose_are_read_and_short_ones_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "PACKAGES", tmp_path)
    folder, long = tmp_path / "anarchism" / "html", "words of a <em>long</em> paragraph, " * 8
    folder.mkdir(parents=True)
    (folder / "secA1.html").write_text(f"<h1>A</h1><p>short</p><p>{long}\n</p>outside")
    (folder / "secA2.html").write_text(f"<p>{long}")
    expected = " ".join(long.replace("<em>", "").replace("</em>", "").split())
    assert prose.expository() == f"{expected}\n\n{expected}"
    with pytest.raises(FileNotFoundError, match="project-history"):
        prose.technical()


def test_budgets_take_no_more_bytes_than_one_density_and_lose_less(tmp_path):
    assert allocation.run(True, tmp_path) == 0
    (record,) = harness.load(tmp_path / harness.FILE).values()
    uniform, *budgets = (record["result"][form] for form in allocation.FORMS)
    for found in budgets:
        assert found["nbytes"] <= uniform["nbytes"]
        assert found["divergence"] < uniform["divergence"]
