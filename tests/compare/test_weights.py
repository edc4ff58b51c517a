import json
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from matfact.compare import StoredMatrix, load_weights
from matfact.compare import _weights as weights_module

W = np.random.RandomState(0).standard_normal((6, 4)).astype(np.float32)
CONV = np.random.RandomState(1).standard_normal((3, 2, 5, 5)).astype(np.float32)


class Bomb:
    """Says so when it is unpickled."""

    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def save_safetensors(path):
    save_file({"fc.weight": W, "conv.weight": CONV, "fc.bias": W[0], "ids": W.astype(int)}, path)


def save_npz(path):
    np.savez(path, **{"fc.weight": W, "conv.weight": CONV, "fc.bias": W[0], "ids": W.astype(int)})


def save_torch(path):
    torch = pytest.importorskip("torch")
    state = {"fc.weight": W, "conv.weight": CONV, "fc.bias": W[0], "ids": W.astype(int)}
    torch.save({k: torch.asarray(v) for k, v in state.items()}, path)


SAVERS = {".safetensors": save_safetensors, ".npz": save_npz, ".pt": save_torch}


@pytest.mark.parametrize("suffix", SAVERS)
def test_matrices_and_flattened_convolutions_are_read(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    SAVERS[suffix](path)
    loaded = load_weights(path)
    assert set(loaded) == {"fc", "conv"}
    np.testing.assert_array_equal(loaded["fc"], W)
    np.testing.assert_array_equal(loaded["conv"], CONV.reshape(3, 50))
    assert loaded.source == str(path)


@pytest.mark.parametrize("suffix", SAVERS)
def test_masks_scales_and_what_is_no_weight_are_left_out(tmp_path, suffix):
    arrays = {
        "h.0.attn.bias": np.ones((1, 1, 9, 9), np.float32),
        "h.0.attn.c_attn.weight": W,
        "q.weight": W,
        "q.weight_zero_point": np.ones(6, np.int8),
        "norm.weight": W,
        "norm.bias": W,
        "embed.weight": W,
        "conv.weight": np.ones((4, 3, 2), np.float32),
        "volume.weight": np.ones((4, 3, 2, 2, 2), np.float32),
    }
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.asarray(array) for name, array in arrays.items()}, path)
    else:
        (save_file if suffix == ".safetensors" else lambda a, p: np.savez(p, **a))(arrays, path)
    loaded = load_weights(path)
    assert {name: array.shape for name, array in loaded.items()} == {
        "h.0.attn.c_attn": (6, 4), "embed": (6, 4), "conv": (4, 6), "volume": (4, 24),
    }  # fmt: skip
    if suffix == ".safetensors":
        assert set(load_weights(path, stored=True)) == set(loaded)


def test_one_array_is_named_by_its_file(tmp_path):
    np.save(tmp_path / "query.npy", W)
    np.testing.assert_array_equal(load_weights(tmp_path / "query.npy")["query"], W)


def test_bfloat16_becomes_the_same_float32(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_file

    half = torch.asarray(W).bfloat16()
    save_torch_file({"other": torch.ones(3, 3), "fc.weight": half}, tmp_path / "m.safetensors")
    torch.save({"model": {"fc.weight": half}}, tmp_path / "m.pt")
    for path, name in ((tmp_path / "m.safetensors", "fc"), (tmp_path / "m.pt", "model.fc")):
        loaded = load_weights(path)[name]
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, half.float().numpy())


@pytest.mark.parametrize("suffix", [*SAVERS, ".npy"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files_are_refused(tmp_path, suffix, damage):
    path = tmp_path / f"model{suffix}"
    SAVERS.get(suffix, lambda path: np.save(path, W))(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-60], "garbage": b"\x93ab" * 99, "empty": b""}[damage])
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    header = {"w": {"dtype": "BF16", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 8]}}
    encoded = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".bin", ".pth", ".safetensors"])
def test_pickles_are_never_run(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".npz":
        np.savez(path, w=np.array([[Bomb()]], dtype=object))
    elif suffix == ".npy":
        np.save(path, np.array([[Bomb()]], dtype=object))
    else:
        path.write_bytes(pickle.dumps({"fc.weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)
    assert not Bomb.exploded


def test_a_pickle_inside_a_torch_archive_is_never_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(tmp_path / "model.pt")
    assert not Bomb.exploded


def test_stored_weights_are_those_that_are_read(tmp_path):
    kernel = np.random.RandomState(0).standard_normal((4, 3, 2, 2))
    arrays = {"fc.weight": W, "conv.weight": kernel, "bias": W[0], "ids": np.ones((3, 3), int)}
    save_file(arrays | {"empty": np.zeros((0, 3))}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **arrays)
    read = load_weights(tmp_path / "m.safetensors")
    stored = load_weights(tmp_path / "m.safetensors", stored=True)
    assert list(stored) == list(read)
    for name, matrix in stored.items():
        assert isinstance(matrix, StoredMatrix)
        assert matrix.dtype == read[name].dtype
        np.testing.assert_array_equal(matrix.read(), read[name])
    assert isinstance(load_weights(tmp_path / "m.npz", stored=True)["fc"], np.ndarray)


def test_other_suffixes_and_missing_files_are_named(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(W))
    with pytest.raises(ValueError, match=r"path must end in one of .*model\.pkl"):
        load_weights(tmp_path / "model.pkl")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_weights(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match=r"or a folder with model\.safetensors"):
        load_weights(tmp_path)


@pytest.mark.parametrize("stored", [False, True])
def test_a_folder_is_read_like_its_file(stored, tmp_path):
    save_file({"fc": W}, tmp_path / "model.safetensors")
    found = load_weights(tmp_path, stored=stored)
    assert found.source == str(tmp_path / "model.safetensors")
    matrix = found["fc"].read() if stored else found["fc"]
    np.testing.assert_array_equal(matrix, W)


def test_a_file_without_matrices_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", bias=W[0], empty=np.zeros((0, 3)), ids=np.ones((3, 3), int))
    with pytest.raises(ValueError, match="holds none"):
        load_weights(tmp_path / "m.npz")


def test_torch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(ImportError, match="extra 'torch'"):
        load_weights(tmp_path / "m.pt")


def test_without_the_demo_package_a_small_network_is_trained(monkeypatch):
    monkeypatch.setattr(weights_module, "DEMO_PACKAGE", "a_package_that_is_not_installed")
    first, again = load_weights(), load_weights()
    assert "digits" in first.source
    assert max(min(matrix.shape) for matrix in first.values()) >= 384
    for name, matrix in first.items():
        np.testing.assert_array_equal(matrix, again[name])


def test_archives_that_would_expand_hugely_are_refused_before(tmp_path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 12, 1 << 13)}
    archive = zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(1 << 7):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="would expand"):
            load_weights(tmp_path / "m.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt"])
def test_archives_of_many_modest_members_are_refused_before(tmp_path, suffix):
    """Each takes a few megabytes, together they take about sixteen times the file."""
    rng = np.random.RandomState(0)
    arrays = {f"{i}": np.tile(rng.standard_normal((640, 64)), 16) for i in range(8)}
    path = tmp_path / f"m{suffix}"
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="save the arrays uncompressed"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_members_that_declare_another_size_are_refused_before(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
        )
    with pytest.raises(ValueError, match="declares"):
        load_weights(tmp_path / "m.npz")


def test_small_arrays_of_zeros_may_be_compressed(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", a=np.zeros((512, 512)))
    assert not load_weights(tmp_path / "m.npz")["a"].any()
