"""Ends of commands by signals, lack of memory or a crash: message and exit status of each."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from matfact import MagnitudePruner
from matfact.cli import app

pytest.importorskip("resource")
SIGNALS = [signal.SIGTERM, signal.SIGHUP]
OPTIONS = ("--method", "magnitude", "--density", "0.5")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture
def source(tmp_path):
    rng = np.random.RandomState(0)
    path = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": rng.randn(32, 32).astype(np.float32) for i in range(3)}, path)
    return path


def compressed(source, out):
    return CliRunner().invoke(app, [*map(str, ("compress", source, out, *OPTIONS))])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def during_fits(monkeypatch, act):
    """Call `act` with the number of each fit before it."""
    fit, fits = MagnitudePruner.fit, []

    def acting(self, W, **arguments):
        fits.append(W.shape)
        act(len(fits))
        return fit(self, W, **arguments)

    monkeypatch.setattr(MagnitudePruner, "fit", acting)


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request):
    """Yield a signal that ends processes, as where Python starts."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_signals_stop_a_run_that_goes_on_later(number, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    compressed(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        during_fits(patch, lambda fit: fit == 2 and signal.raise_signal(number))
        result = compressed(source, out)
    assert result.exit_code == 128 + number
    assert "Stopped" in result.output
    assert signal.getsignal(number) == signal.SIG_DFL
    assert sorted(os.listdir(out)) == ["00001.safetensors", "journal.log"]
    assert compressed(source, out).exit_code == 0
    assert content(out) == content(tmp_path / "whole")


def test_a_signal_that_comes_again_does_not_stop_the_tidying(number, source, tmp_path, monkeypatch):
    def stop_twice(fit):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            (tmp_path / "tidied").touch()

    during_fits(monkeypatch, stop_twice)
    assert compressed(source, tmp_path / "out").exit_code == 128 + number
    assert (tmp_path / "tidied").exists()


def test_signals_that_are_ignored_stay_so(number, source, tmp_path, monkeypatch):
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    during_fits(monkeypatch, lambda fit: signal.raise_signal(number))
    assert compressed(source, tmp_path / "out").exit_code == 0
    assert signal.getsignal(number) == signal.SIG_IGN


def test_the_library_leaves_signals_alone(number, source, tmp_path, monkeypatch):
    from matfact.checkpoint import compress

    seen = []
    during_fits(monkeypatch, lambda fit: seen.append(signal.getsignal(number)))
    compress(source, tmp_path / "out", MagnitudePruner(density=0.5))
    assert seen == [signal.SIG_DFL] * 3


def test_a_crash_is_told_from_a_run_without_gain(source, tmp_path, monkeypatch):
    def crash(fit):
        raise TypeError("an error of ours")

    save_file({"w.weight": np.ones((2, 2), np.float32)}, tmp_path / "tiny.safetensors")
    without_gain = compressed(tmp_path / "tiny.safetensors", tmp_path / "tiny")
    during_fits(monkeypatch, crash)
    result = compressed(source, tmp_path / "out")
    assert isinstance(result.exception, TypeError)  # Python shows where, and ends with 1
    assert without_gain.exit_code not in (0, 1, result.exit_code)


LIMITED = """
import resource, sys
import numpy as np
import matfact.checkpoint
from matfact import MagnitudePruner
from matfact.cli import app

MagnitudePruner().fit(np.eye(64, dtype=np.float32))  # what is compiled needs memory of its own
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
app(sys.argv[1:])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_running_out_of_memory_is_one_line(tmp_path):
    shape = [4096, 8192]
    end = 4 * shape[0] * shape[1]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"a.weight": tensor}).encode().ljust(128)
    source = tmp_path / "model.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source, 8 + len(header) + end)  # zeros that take no place
    words = ("compress", source, tmp_path / "out", *OPTIONS)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: out of memory")
    assert set(os.listdir(tmp_path / "out")) <= {"journal.log"}


KILLED_BEFORE_RENAMES = """
import os, signal, sys
from pathlib import Path

import numpy as np

from matfact.checkpoint import decompress, save
from matfact.compare import Comparison

folder = Path(sys.argv[1])
save(folder / "network", {"a": np.ones(3)})
writers = {
    "dense": lambda path: decompress(folder / "network", path),
    "copy": lambda path: save(path, {"a": np.ones(3)}),
    "comparison.csv": Comparison([], {}).to_csv,
}
for name, write in writers.items():
    place = folder / f"for {name}"
    place.mkdir()
    (place / ".movie.part").touch()
    for _ in range(2):
        if os.fork() == 0:
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            write(place / name)
        os.wait()
    print(len(list(place.iterdir())) - 1)
    write(place / name)
"""


def test_leftovers_of_killed_writers_are_cleared_by_the_next(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_RENAMES, tmp_path],
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 3 * ["1"]  # the second run removes what the first left
    for name in ("dense", "copy", "comparison.csv"):
        assert sorted(os.listdir(tmp_path / f"for {name}")) == [".movie.part", name]
