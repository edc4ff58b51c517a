"""Files that change during or after reading: only verified data is used."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from matfact import MagnitudePruner, _safetensors_file
from matfact.checkpoint import Checkpoint, compress, decompress, save
from matfact.checkpoint._source import Source
from matfact.compare import StoredMatrix, load_weights
from matfact.operators import DenseFactor, FactorProduct
from matfact.torch import load_network, save_network

HALF = MagnitudePruner(density=0.5)


def weights(seed):
    rng = np.random.RandomState(seed)
    held = {f"{i}.weight": rng.standard_normal((12, 8)).astype(np.float32) for i in range(3)}
    return held | {"table": rng.standard_normal((40, 8)).astype(np.float32)}


def change_in_place(path, at=-4 * 8 * 40 - 1):
    """Change one byte, by default of the layer read last, and leave size and times as they were."""
    status = os.stat(path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path):
    """Put another network of the same shapes there, with the same size and times."""
    status = os.stat(path)
    save_file(weights(seed=1), path.with_name("other"))
    os.utime(path.with_name("other"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_name("other"), path)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(weights(seed=0), path)
    return path


@pytest.fixture
def folder(tmp_path):
    product = FactorProduct([DenseFactor(np.ones((12, 1))), DenseFactor(np.ones((1, 8)))])
    save(tmp_path / "network", {"fc.weight": product, "b": np.arange(4.0), "c": np.ones(3)})
    return tmp_path / "network"


@pytest.mark.parametrize("change", [replace, change_in_place])
@pytest.mark.parametrize("moment", [1, 2])
def test_a_source_that_changes_while_it_is_compressed_gives_no_checkpoint(
    change, moment, source, tmp_path
):
    def progress(shard, total):
        done.append(shard)
        if len(done) == moment:
            change(source)

    done, original = [], source.read_bytes()
    with pytest.raises(ValueError, match=r"m\.safetensors must stay as it is"):
        compress(source, tmp_path / "out", HALF, progress=progress)
    assert not (tmp_path / "out" / "manifest.json").exists()
    source.write_bytes(original)
    resumed = compress(source, tmp_path / "out", HALF)
    fresh = compress(source, tmp_path / "fresh", HALF)
    assert [s.sha256 for s in resumed.shards] == [s.sha256 for s in fresh.shards]


def test_workers_refuse_a_source_that_is_not_the_one_that_was_hashed(source):
    network = Source(source)
    network.digests()
    location = pickle.loads(pickle.dumps(network.location("0.weight")))
    np.testing.assert_array_equal(location.read(), weights(seed=0)["0.weight"])
    replace(source)
    for read in (location.read, lambda: list(location.chunks())):
        with pytest.raises(ValueError, match=r"must stay as it is .*'0\.weight'"):
            read()


@pytest.mark.parametrize("name", ["fc.weight", "b"])
def test_a_byte_that_changes_after_the_check_is_noticed(name, folder, tmp_path):
    network = Checkpoint(folder)
    network.verify()
    before = network[name]
    change_in_place(folder / network._shards[name].file, at=-25 if name == "b" else -1)
    with pytest.raises(ValueError, match=r"damaged|must stay as it is"):
        network[name]
    expected = np.arange(4) if name == "b" else np.ones((12, 8))
    np.testing.assert_array_equal(np.asarray(before), expected)
    with pytest.raises(ValueError, match=r"damaged|must stay as it is"):
        decompress(folder, tmp_path / "dense.safetensors")
    assert not (tmp_path / "dense.safetensors").exists()


@pytest.fixture
def cutting(monkeypatch):
    """Cut each file when the first of its tensors is about to be read."""
    pieces = _safetensors_file._pieces

    def watched(file, nbytes):
        os.truncate(f"/proc/self/fd/{file.fileno()}", 9)
        yield from pieces(file, nbytes)

    monkeypatch.setattr(_safetensors_file, "_pieces", watched)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_files_cut_while_they_are_hashed_are_refused(cutting, tmp_path):
    large = {"fc.weight": np.ones((600, 600), np.float32)}  # more than is read with the header
    save_file(large, tmp_path / "m.safetensors")
    save(tmp_path / "network", large)
    with pytest.raises(ValueError, match=r"m\.safetensors must stay as it is"):
        compress(tmp_path / "m.safetensors", tmp_path / "out", HALF)
    with pytest.raises(ValueError, match=r"00000\.safetensors must stay as it is"):
        Checkpoint(tmp_path / "network").verify()


def cut_all(folder):
    for path in folder.iterdir():
        os.truncate(path, 0)


@pytest.mark.parametrize("is_built", [True, False])
def test_networks_that_were_loaded_outlive_their_files(is_built, tmp_path):
    def build():
        return nn.Sequential(nn.Embedding(600, 40), nn.Linear(40, 30), nn.LayerNorm(30))

    save_network(build(), tmp_path / "network")
    model = load_network(build if is_built else build(), tmp_path / "network")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut_all(tmp_path / "network")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model[0].weight += 1  # memory of its own can be written to


def test_values_that_were_read_outlive_their_files(folder, source, tmp_path):
    product = Checkpoint(folder)["fc.weight"]
    product.save(tmp_path / "product.safetensors")
    loaded = FactorProduct.load(tmp_path / "product.safetensors")
    read = load_weights(source)
    cut_all(folder)
    for path in (source, tmp_path / "product.safetensors"):
        os.truncate(path, 0)
    np.testing.assert_array_equal(product.toarray(), np.ones((12, 8)))
    np.testing.assert_array_equal(loaded.toarray(), np.ones((12, 8)))
    np.testing.assert_array_equal(read["0"], weights(seed=0)["0.weight"])


def test_stored_matrices_are_of_the_file_that_was_found(source):
    matrix = StoredMatrix(source, "0.weight").window(slice(4), slice(4))
    matrix = pickle.loads(pickle.dumps(matrix))
    np.testing.assert_array_equal(matrix.read(), weights(seed=0)["0.weight"][:4, :4])
    save_file({"0.weight": np.ones((12, 9), np.float32)}, source)
    with pytest.raises(ValueError, match="must stay as it is"):
        matrix.read()
