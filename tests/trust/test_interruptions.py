"""Ctrl-C, SIGTERM, a full disk: files stay intact, and work can be resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from matfact import DoubleSparseFactorizer, MagnitudePruner
from matfact.checkpoint import compress, decompress

resource = pytest.importorskip("resource")

COMPRESS = ("--method", "dsf", "--density", "0.5")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.RandomState(0)
    weights = {f"{i}.weight": rng.randn(128, 128).astype(np.float32) for i in range(12)}
    path = tmp_path_factory.mktemp("interrupted") / "model.safetensors"
    save_file(weights, path)
    return path


def started(*words, limit=None):
    """Start the command in a process of its own, which may write files up to `limit` bytes."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # SIGINT is ignored in background jobs of shells; a handler of Python's own must be there.
    code = "import sys; from matfact.cli import app; app(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=prepare,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


def told(output):
    """The one line that a stopped command wrote.

    On a busy machine joblib's own tracker sometimes adds that it cleaned up after a worker.
    """
    line, *rest = output.strip().splitlines()
    assert not rest or "resource_tracker.py" in rest[0], output
    return line


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sigterm_while_compressing_ends_workers_and_leaves_work_that_goes_on(source, tmp_path):
    out = tmp_path / "out"
    process = started("compress", source, out, *COMPRESS, "--jobs", "2")
    wait_for(lambda: (out / "00002.safetensors").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # idle workers would hold the pipe for minutes
    assert process.returncode == 128 + signal.SIGTERM, output
    assert told(output) == "Stopped; every file is complete or as it was."
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*"))
    finished = {path: path.stat().st_ino for path in out.glob("0*.safetensors")}
    compress(source, out, DoubleSparseFactorizer(density=0.5))
    kept = [path for path, inode in finished.items() if path.stat().st_ino == inode]
    assert len(kept) >= len(finished) - 2  # but those not yet recorded
    assert not list(out.glob(".*"))


def test_no_worker_goes_on_when_whoever_is_told_of_progress_raises(source, tmp_path, recwarn):
    def progress(shard, total):
        raise RuntimeError("seen enough")

    options = {"n_jobs": 2, "progress": progress}
    with pytest.raises(RuntimeError, match="seen enough"):
        compress(source, tmp_path / "out", DoubleSparseFactorizer(density=0.5), **options)
    before = sorted(os.listdir(tmp_path / "out"))
    time.sleep(2)  # two fits take less
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert not [name for name in before if name.startswith(".")]
    assert not [warning for warning in recwarn if "cancelled" in str(warning.message)]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_a_worker_killed_for_its_memory_is_one_line(source, tmp_path):
    out = tmp_path / "out"
    process = started("compress", source, out, *COMPRESS, "--jobs", "2")
    wait_for(lambda: (out / "00002.safetensors").exists() or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"LokyProcess" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert told(output).startswith("Error: a worker process was killed")
    assert not list(out.glob(".*"))


def test_ctrl_c_while_comparing_leaves_earlier_tables(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.csv").write_text("earlier")
    words = ("--sizes", "128", "--per-size", "12", "--methods", "dsf", "--jobs", "1")
    process = started("compare", source, *words, "--output", out)
    for line in process.stdout:
        if "matrices from" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Stopped" in output
    assert content(out) == {"comparison.csv": b"earlier"}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, tmp_path):
    out = tmp_path / "out"
    words = ("compress", source, out, "--method", "magnitude", "--density", "0.5")
    process = started(*words, limit=30_000)  # factors of a layer take 35 kB
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "Error" in output
    assert "Traceback" not in output
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*"))
    for folder in (out, tmp_path / "whole"):
        compress(source, folder, MagnitudePruner(density=0.5))
    assert content(out) == content(tmp_path / "whole")


def test_a_disk_full_while_decompressing_leaves_the_earlier_file(source, tmp_path):
    compress(source, tmp_path / "network", MagnitudePruner(density=0.5))
    dense = tmp_path / "dense.safetensors"
    dense.write_bytes(b"earlier")
    process = started("decompress", tmp_path / "network", dense, limit=300_000)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert dense.read_bytes() == b"earlier"
    assert sorted(os.listdir(tmp_path)) == ["dense.safetensors", "network"]
    decompress(tmp_path / "network", dense)
    assert dense.stat().st_size > 300_000
