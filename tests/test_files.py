import os

import pytest

from matfact import _files


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    _files.write_atomically(path, b"earlier")

    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["results.csv"]


def test_a_later_write_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "results.csv"
    for content in (b"earlier", b"later"):
        _files.write_atomically(path, content)
    assert path.read_bytes() == b"later"
