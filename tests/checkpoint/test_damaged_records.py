"""Damaged, odd or hostile journals of earlier runs are refused or ignored."""

import hashlib
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from matfact import MagnitudePruner
from matfact.checkpoint import Checkpoint, compress

HALF = MagnitudePruner(density=0.5)


@pytest.fixture
def source(tmp_path):
    rng = np.random.RandomState(0)
    path = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": rng.randn(32, 32).astype(np.float32) for i in range(3)}, path)
    return path


@pytest.fixture
def expected(source, tmp_path):
    compress(source, tmp_path / "whole", HALF)
    return content(tmp_path / "whole")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(shard, total):
    raise KeyboardInterrupt


def line(text):
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def shard(**changes):
    tensor = {"name": "0.weight", "dtype": "F32", "shape": [32, 32]}
    fields = {"file": "00001.safetensors", "nbytes": 1, "sha256": "0" * 64, "tensors": [tensor]}
    return fields | changes


ODD = {
    "empty": b"",
    "null": line(b"null"),
    "a number": line(b"1" + b"0" * 400),
    "too long a number": line(b'{"a": ' + b"1" * 5000 + b"}"),
    "no text": line(b"\xff\xfe"),
    "deep": line(b'{"a":' * 100_000 + b"}" * 100_000),
    "lines without end": b"\n" * (1 << 24),
    "no line": b"x" * (1 << 24),
}


@pytest.mark.parametrize("kind", ODD)
def test_work_with_an_unreadable_record_begins_anew(kind, source, expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "journal.log").write_bytes(ODD[kind])
    began = time.perf_counter()
    tracemalloc.start()
    try:
        compress(source, out, HALF)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert content(out) == expected
    assert time.perf_counter() - began < 5
    assert peak < 4 * len(ODD[kind]) + (64 << 20)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
@pytest.mark.parametrize("kind", ["a named pipe", "a link", "a folder"])
def test_a_record_that_is_no_regular_file_is_refused_and_stays(kind, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    journal = out / "journal.log"
    if kind == "a named pipe":
        os.mkfifo(journal)
    elif kind == "a folder":
        journal.mkdir()
    else:
        journal.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"journal\.log must be a regular file, but it is {kind}"):
        compress(source, out, HALF)
    assert os.listdir(out) == ["journal.log"]


def test_a_record_longer_than_any_is_not_read(source, expected, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / "journal.log").open("wb") as file:
        file.truncate(3 << 30)
    compress(source, out, HALF)
    assert content(out) == expected


@pytest.mark.parametrize(
    "fields",
    [
        [],
        shard(nbytes=10**400),
        shard(nbytes=-1),
        shard(file="../precious"),
        shard(file="00001.safetensors/../../precious"),
        shard(tensors=[None]),
        shard(tensors=[{"name": "0.weight", "dtype": "F32", "shape": [10**400]}]),
        shard(sha256=[]),
    ],
    ids=str,
)
def test_lines_that_describe_no_file_count_as_not_written(fields, source, expected, tmp_path):
    (tmp_path / "precious").write_bytes(b"years of work")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(source, out, HALF, progress=stop)
    with (out / "journal.log").open("ab") as file:
        file.write(line(json.dumps(fields).encode()))
    compress(source, out, HALF)
    assert content(out) == expected
    assert (tmp_path / "precious").read_bytes() == b"years of work"


def test_a_file_recorded_many_times_is_checked_once(source, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(source, out, HALF, progress=stop)
    settings, record = (out / "journal.log").read_bytes().splitlines(keepends=True)
    (out / "journal.log").write_bytes(settings + 20_000 * record)
    opened = []
    monkeypatch.setattr(
        "matfact.checkpoint._journal.check_shard", lambda folder, shard: opened.append(shard.file)
    )
    compress(source, out, HALF)
    assert len(opened) == 1
    assert content(out) == expected


@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_a_complete_folder_with_a_damaged_file_is_mended(damage, source, expected, tmp_path):
    out = tmp_path / "whole"
    victim, other = out / "00002.safetensors", out / "00001.safetensors"
    before = victim.read_bytes()
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(before[:-1] + (b"" if damage == "cut" else bytes([before[-1] ^ 1])))
    inode = other.stat().st_ino
    compress(source, out, HALF).verify()
    assert content(out) == expected
    assert other.stat().st_ino == inode  # what is whole is not made again
    Checkpoint(out).verify()


def test_a_locked_folder_is_not_tidied(source, tmp_path):
    pytest.importorskip("fcntl")
    from matfact._files import claimed

    out = tmp_path / "out"
    out.mkdir()
    (out / ".x.matfact-0123456789abcdef.part").write_bytes(b"of the other process")
    with claimed(out), pytest.raises(ValueError, match="another process"):
        compress(source, out, HALF)
    assert os.listdir(out) == [".x.matfact-0123456789abcdef.part"]
