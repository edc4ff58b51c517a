"""Work on a cluster of processes: the same bytes, whoever dies, and no weights on the wire."""

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

from matfact import DoubleSparseFactorizer, MagnitudePruner, compare_projections
from matfact.checkpoint import _compress, compress
from matfact.cli import app
from matfact.compare import StoredMatrix
from matfact.compare import _study as study

N_LAYERS = 8


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
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


def test_the_command_takes_the_address_of_a_scheduler(client, source, tmp_path):
    compress(source, tmp_path / "serial", MagnitudePruner(density=0.5))
    words = ["compress", source, tmp_path / "out", "--method", "magnitude"]
    words += ["--scheduler", client.scheduler.address]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "out") == content(tmp_path / "serial")


def test_studies_agree_but_for_the_seconds(client, source):
    matrices = {f"W{i}": StoredMatrix(source, f"{i}.weight") for i in range(2)}
    methods = ["magnitude", "lowrank"]
    serial = compare_projections(matrices, methods)
    with joblib.parallel_config("dask", client=client):
        spread = compare_projections(matrices, methods)
    rows = [[dataclasses.replace(row, seconds=0) for row in table] for table in (serial, spread)]
    assert rows[0] == rows[1]
    assert {row.status for row in serial} == {"ok"}


def test_stored_matrices_are_windows_of_the_file(source):
    whole = StoredMatrix(source, "1.weight")
    window = StoredMatrix(source, "1.weight", slice(8, 24), slice(-4, None))
    assert (whole.shape, window.shape) == ((48, 40), (16, 4))
    np.testing.assert_array_equal(window.read(), whole.read()[8:24, -4:])
    with pytest.raises(ValueError, match="name must be"):
        StoredMatrix(source, "bias")


def test_tasks_hold_no_weights(source, tmp_path, monkeypatch):
    sent = []

    def delayed(function):
        def call(*arguments):
            sent.append(len(pickle.dumps(arguments)))
            return joblib.delayed(function)(*arguments)

        return call

    for module in (_compress, study):
        fake = type("joblib", (), {"delayed": staticmethod(delayed)})
        monkeypatch.setattr(module, "joblib", fake)
    compress(source, tmp_path / "out", MagnitudePruner())
    compare_projections([StoredMatrix(source, "0.weight")], ["magnitude"])
    assert len(sent) == N_LAYERS + 1
    assert max(sent) < 48 * 40 * 4 / 2


def test_dask_is_named_where_it_is_missing(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["compress", str(source), str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "matfact[distributed]" in result.output
    assert not (tmp_path / "out").exists()
