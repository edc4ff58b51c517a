"""Existing files at the output path are not touched, or replaced with mode and owner kept."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import matfact
from matfact import MagnitudePruner
from matfact.checkpoint import Checkpoint, compress, decompress, save
from matfact.cli import app
from matfact.torch import save_network

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links and pipes of POSIX")
PACKAGE = Path(matfact.__file__).parent
HALF = MagnitudePruner(density=0.5)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.random.RandomState(0).randn(32, 32)}, path)
    return path


@pytest.fixture
def network(source, tmp_path):
    compress(source, tmp_path / "network", HALF)
    return tmp_path / "network"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def commands(network, target):
    """Yield the words of each command that writes the file `target`."""
    yield "decompress", network, target
    yield "inspect", network, "--html", target


@pytest.mark.parametrize("place", ["manifest.json", "00001.safetensors", "link to it"])
def test_files_of_the_checkpoint_are_no_place_for_output(place, network, tmp_path):
    before = content(network)
    target = network / place
    if place == "link to it":
        target = tmp_path / "link"
        target.symlink_to(network / "manifest.json")
    for words in commands(network, target):
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 2, result.output
        assert "which is read" in result.output
    assert content(network) == before
    Checkpoint(network).verify()


def test_what_is_no_regular_file_is_refused(network, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", "/dev/null", tmp_path):
        for words in commands(network, target):
            result = CliRunner().invoke(app, [*map(str, words)])
            assert result.exit_code == 2, result.output
            assert "must be a regular file" in result.output
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_study_is_refused_before_its_work(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.csv").write_text("earlier")
    os.mkfifo(out / "comparison.png")
    options = ("--sizes", "32", "--methods", "magnitude", "--output", out)
    result = CliRunner().invoke(app, [*map(str, ("compare", source, *options))])
    assert result.exit_code == 2, result.output
    assert "comparison.png must be a regular file" in " ".join(result.output.split())
    assert "matrices from" not in result.output
    assert sorted(os.listdir(out)) == ["comparison.csv", "comparison.png"]
    assert (out / "comparison.csv").read_text() == "earlier"


def test_a_link_for_the_dense_file_stays_a_link(network, source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "dense").write_bytes(b"earlier")
    (tmp_path / "dense").symlink_to("disk/dense")
    decompress(network, tmp_path / "dense")
    assert (tmp_path / "dense").is_symlink()
    assert set(load_file(tmp_path / "disk" / "dense")) == {"a.weight"}


@pytest.mark.parametrize("exists", [True, False])
def test_networks_are_saved_through_a_link_to_a_folder(exists, tmp_path):
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "network").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("disk/network")
    save_network(torch.nn.Linear(4, 3), tmp_path / "link")
    assert set(Checkpoint(tmp_path / "disk" / "network")) == {"weight", "bias"}
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["network"]
    if exists:
        assert (tmp_path / "disk" / "network").stat().st_mode & 0o777 == 0o750
    with pytest.raises(FileExistsError, match="new or empty folder"):
        save(tmp_path / "link", {"a": np.ones(3)})


@pytest.mark.parametrize("kind", ["file", "pipe", "link to nowhere and back"])
def test_networks_are_saved_in_no_place_of_another_kind(kind, tmp_path):
    target = tmp_path / "target"
    if kind == "file":
        target.write_bytes(b"earlier")
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(target)
    with pytest.raises(FileExistsError, match="new or empty folder"):
        save(target, {"a": np.ones(3)})
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_among_the_files_of_a_run_is_not_followed(source, tmp_path):
    (tmp_path / "precious").write_bytes(b"years of work")
    compress(source, tmp_path / "whole", HALF)
    out = tmp_path / "out"
    for name in ("journal.log", "00001.safetensors", "manifest.json"):
        out.mkdir()
        (out / name).symlink_to(tmp_path / "precious")
        with pytest.raises((ValueError, FileNotFoundError), match=r"out"):
            compress(source, out, HALF)
        assert (tmp_path / "precious").read_bytes() == b"years of work"
        (out / name).unlink()
        out.rmdir()


def test_one_file_alone_writes_and_renames():
    """There is one road to the disk, so that what it guards against is guarded everywhere."""
    writers = {
        "write_text",
        "write_bytes",
        "replace",
        "rename",
        "savez",
        "tofile",
        "open",
        "mkstemp",
    }
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            owner, _, name = ast.unparse(node.func).rpartition(".")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            reads = name == "open" and not {c for m in modes for c in str(m)} & set("wax+")
            of_text = name == "replace" and owner != "os"  # also of dataclasses and layers
            if name in writers and not reads and not of_text:
                found.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
    others = [line for line in found if not line.startswith("_files.py")]
    assert len(found) > len(others)
    assert others == [
        # A record to which lines are added.
        "checkpoint/_journal.py: (self.folder / JOURNAL).open('ab')",
    ]
