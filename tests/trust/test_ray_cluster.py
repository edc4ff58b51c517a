"""Work on a Ray cluster of two processes gives the same result as one process."""

import dataclasses

import joblib
import numpy as np
import pytest
from safetensors.numpy import save_file

from matfact import DoubleSparseFactorizer, compare_projections
from matfact.checkpoint import compress

pytest.importorskip("ray.util.joblib")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray
    from ray.util.joblib import register_ray

    with pytest.MonkeyPatch.context() as patch:
        # By default workers are as nice as can be, and wait for everything else on the machine.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
        register_ray()
        yield
        ray.shutdown()


def test_compress_gives_the_same_bytes(tmp_path):
    rng = np.random.RandomState(0)
    weights = {f"{i}.weight": rng.randn(48, 40).astype(np.float32) for i in range(4)}
    save_file(weights, tmp_path / "m.safetensors")
    factorizer = DoubleSparseFactorizer(density=0.5, max_iter=5)
    compress(tmp_path / "m.safetensors", tmp_path / "serial", factorizer)
    with joblib.parallel_config("ray"):
        compress(tmp_path / "m.safetensors", tmp_path / "cluster", factorizer, n_jobs=2)
    folders = [tmp_path / "serial", tmp_path / "cluster"]
    serial, cluster = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert cluster == serial


def test_studies_agree_but_for_the_seconds():
    matrices = [np.random.RandomState(seed).standard_normal((24, 24)) for seed in range(2)]
    serial = compare_projections(matrices, ["magnitude", "lowrank"])
    with joblib.parallel_config("ray"):
        spread = compare_projections(matrices, ["magnitude", "lowrank"], n_jobs=2)
    rows = [[dataclasses.replace(row, seconds=0) for row in table] for table in (serial, spread)]
    assert rows[0] == rows[1]
