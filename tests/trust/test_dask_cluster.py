"""Work on a Dask cluster: identical bytes even if workers die, and no weights are sent."""

import dataclasses
import os
import pickle
import signal
import sys

import joblib
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

# The benchmarks are not installed with the library.
from benchmarks import cluster
from matfact import DoubleSparseFactorizer, MagnitudePruner, compare_projections
from matfact._parallel import on_cluster
from matfact.checkpoint import _writing, compress
from matfact.cli import app
from matfact.compare import Comparison, StoredMatrix, cut_matrices, load_weights
from matfact.compare import _study as study

resource = pytest.importorskip("resource")

N_LAYERS = 8


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as local,
        distributed.Client(local) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.RandomState(0)
    weights = {f"{i}.weight": rng.randn(48, 40).astype(np.float32) for i in range(N_LAYERS)}
    path = tmp_path_factory.mktemp("cluster") / "model.safetensors"
    save_file(weights | {"bias": np.ones(3)}, path)
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_result_is_that_of_one_process_though_a_worker_is_killed(client, source, tmp_path):
    factorizer = DoubleSparseFactorizer(density=0.5, max_iter=5)
    compress(source, tmp_path / "serial", factorizer)
    victim, *_ = client.run(os.getpid).values()
    finished = []

    def progress(shard, total):
        finished.append(shard.file)
        if len(finished) == 2:  # the plain tensors, and a layer
            os.kill(victim, signal.SIGKILL)

    with joblib.parallel_config("dask", client=client):
        compress(source, tmp_path / "cluster", factorizer, progress=progress)
    assert content(tmp_path / "cluster") == content(tmp_path / "serial")
    assert sorted(finished) == sorted(set(finished))
    assert len(finished) == N_LAYERS + 1


def but_for_the_seconds(table):
    return [dataclasses.replace(row, seconds=0) for row in table]


def test_studies_agree_but_for_the_seconds_though_a_worker_is_killed(client, source):
    matrices = {f"W{i}": StoredMatrix(source, f"{i}.weight") for i in range(4)}
    methods = ["magnitude", "lowrank"]
    serial = compare_projections(matrices, methods)
    victim, *_ = client.run(os.getpid).values()
    finished = []

    def progress(row, total):
        finished.append((row.matrix, row.method, total))
        if len(finished) == 2:
            os.kill(victim, signal.SIGKILL)

    with joblib.parallel_config("dask", client=client):
        spread = compare_projections(matrices, methods, progress=progress)
    assert but_for_the_seconds(spread) == but_for_the_seconds(serial)
    assert {row.status for row in serial} == {"ok"}
    assert sorted(finished) == sorted((name, method, 8) for name in matrices for method in methods)


# Workers are not in the folder that the paths start from.
def test_compress_takes_the_address_of_a_scheduler(client, source, tmp_path, monkeypatch):
    compress(source, tmp_path / "serial", MagnitudePruner(density=0.5))
    monkeypatch.chdir(source.parent)
    words = ["compress", source.name, os.path.relpath(tmp_path / "out"), "--method", "magnitude"]
    result = CliRunner().invoke(app, [*words, "--scheduler", client.scheduler.address])
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "out") == content(tmp_path / "serial")


def test_compare_takes_the_address_of_a_scheduler(client, source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    words = ["compare", source.name, "--sizes", "16,40", "--methods", "magnitude,lowrank"]
    spread = [*words, "--output", tmp_path / "spread", "--scheduler", client.scheduler.address]
    for arguments in ([*words, "--output", tmp_path / "serial", "--jobs", "1"], spread):
        result = CliRunner().invoke(app, [str(word) for word in arguments])
        assert result.exit_code == 0, result.output
    tables = [
        Comparison.from_json(tmp_path / folder / "comparison.json")
        for folder in ("spread", "serial")
    ]
    assert but_for_the_seconds(tables[0]) == but_for_the_seconds(tables[1])
    assert len(tables[0]) == 2 * 4 * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of processes")
def test_the_benchmark_measures_workers(client, source, tmp_path):
    rows = [cluster.timed(source, tmp_path / f"{c is None}", c) for c in (None, client)]
    assert all(row["seconds"] > 0 and row["processor_seconds"] > 0 for row in rows)
    assert cluster.contents(tmp_path / "True") == cluster.contents(tmp_path / "False")
    rest = client.run(cluster.reset_peak)
    client.run(lambda: np.ones(1 << 22).nbytes)  # 32 MiB
    for worker, peak in client.run(cluster.resident, "VmHWM").items():
        assert 0.9 < (peak - rest[worker]) / (1 << 25) < 1.5


def test_stored_matrices_are_windows_of_the_file(source):
    whole = StoredMatrix(source, "1.weight")
    window = StoredMatrix(source, "1.weight", slice(8, 24), slice(-4, None))
    assert (whole.shape, window.shape) == ((48, 40), (16, 4))
    np.testing.assert_array_equal(window.read(), whole.read()[8:24, -4:])
    part = window.window(slice(None, None, -2), slice(1, 3), np.float64)
    assert (part.shape, part.dtype) == ((8, 2), np.float64)
    np.testing.assert_array_equal(part.read(), window.read()[::-2, 1:3])
    with pytest.raises(ValueError, match="name must be"):
        StoredMatrix(source, "bias")


def test_tasks_hold_no_weights(source, tmp_path, monkeypatch):
    sent = []

    def delayed(function):
        def call(*arguments):
            sent.append(len(pickle.dumps(arguments)))
            return joblib.delayed(function)(*arguments)

        return call

    for module in (_writing, study):
        fake = type("joblib", (), {"delayed": staticmethod(delayed)})
        monkeypatch.setattr(module, "joblib", fake)
    compress(source, tmp_path / "out", MagnitudePruner())
    windows = cut_matrices(load_weights(source, stored=True), sizes=[40], per_size=3)
    compare_projections(windows, ["magnitude"])
    assert len(sent) == N_LAYERS + 3
    assert max(sent) < 1000  # a weight takes 7,680 bytes


def test_dask_is_named_where_it_is_missing(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["compress", str(source), str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "pip install -e '.[distributed]'" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_slow_workers_are_waited_for(client):
    with on_cluster(client.scheduler.address):
        backend, _ = joblib.parallel.get_active_backend()
        assert backend.wait_for_workers_timeout == 60
