"""Checkpoints written from memory: lossless, and damage is detected."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.checkpoint import Checkpoint, decompress, save
from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    QuantizedFactor,
    SelectionFactor,
    SignFactor,
    SparseFactor,
)
from matfact.operators._quantized import group_bounds

#: Written by the last release of the code that wrote version 1.
VERSION_1 = Path(__file__).parent / "version-1"
DOCS = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"


def sparse(rng, rows, columns, density, dtype):
    dense = np.where(rng.random_sample((rows, columns)) < density, rng.randn(rows, columns), 0)
    return SparseFactor.from_dense(dense.astype(dtype))


def products(dtype):
    """Return a product of each storage."""
    rng = np.random.RandomState(0)

    def random(*shape):
        values = rng.randn(*shape)
        if np.issubdtype(dtype, np.complexfloating):
            values = values + 1j * rng.randn(*shape)
        return values.astype(dtype)

    blocks = [random(3, 4), random(2, 5)]
    return {
        "bitmask": FactorProduct([sparse(rng, 12, 9, 0.5, dtype), sparse(rng, 9, 20, 0.3, dtype)]),
        "gaps": FactorProduct([sparse(rng, 9, 1000, 0.01, dtype)]),
        "dense": FactorProduct([DenseFactor(random(6, 2)), DenseFactor(random(2, 5))]),
        "kronecker": FactorProduct([KroneckerSparseFactor(random(2, 3, 2, 4))]),
        "blocks": FactorProduct(
            [BlockSparseFactor.from_blocks(blocks, [(0, 0), (3, 5)], (8, 12), like=blocks[0])]
        ),
        "selection": FactorProduct(
            [
                DenseFactor(random(3, 4)),
                SelectionFactor.from_index([5, -1, 0, 2], 7, like=np.zeros(0, dtype)),
            ]
        ),
        "csr": FactorProduct([SparseFactor(random(2), np.int32([3, 0]), np.array([0, 2]), 4)]),
    }


def quantized_products(dtype):
    """Return products whose values take few bits, by the names of their storage."""
    rng = np.random.default_rng(0)
    patterns = {
        "dense, 8 bits": DenseFactor(np.ones((5, 30))),
        "bitmask, 3 bits": sparse(np.random.RandomState(0), 30, 50, 0.7, np.float64),
        "gaps, 4 bits": sparse(np.random.RandomState(0), 30, 50, 0.1, np.float64),
        "csr, 2 bits": SparseFactor(np.ones(2), np.int32([3, 0]), np.array([0, 2]), 4),
        "kronecker, 5 bits": products(np.float64)["kronecker"][0],
        "blocks, 6 bits": products(np.float64)["blocks"][0],
    }
    found = {}
    for (name, pattern), group_size in zip(patterns.items(), [8, 8, None, 1, 7, 100], strict=True):
        bits = int(name.split()[1])
        values = rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), pattern.values.shape)
        n_groups = len(group_bounds(pattern, group_size)) - 1
        scales = rng.uniform(0.5, 2, n_groups).astype(np.float16).astype(dtype)
        factor = QuantizedFactor(values.astype(np.int8), scales, bits, group_size, pattern)
        found[name] = FactorProduct([factor])
    signs = SignFactor.from_dense(rng.standard_normal((5, 30)).astype(dtype))
    return found | {"sign": FactorProduct([signs, DenseFactor(np.ones((30, 2), dtype))])}


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint with everything in it."""
    rng = np.random.RandomState(1)
    content = {
        "fc.weight": products(np.float32)["bitmask"],
        "conv.weight": FactorProduct([sparse(rng, 4, 18, 0.5, np.float32)]),
        "fc.bias": np.arange(12, dtype=np.float32),
        "steps": np.array(3),
    }
    save(
        tmp_path / "network",
        content,
        shapes={"conv.weight": (4, 2, 3, 3)},
        settings={"method": "by hand"},
        metadata={"format": "pt"},
    )
    return tmp_path / "network"


SPECS = {np.float16: "F16", np.float32: "F32", np.float64: "F64", np.complex64: "C64"}


@pytest.mark.parametrize("dtype", SPECS)
def test_factors_of_every_storage_come_back_bit_by_bit(dtype, tmp_path):
    content = products(dtype)
    if dtype is not np.complex64:
        content |= quantized_products(dtype)
    save(tmp_path / "network", content)
    loaded = Checkpoint(tmp_path / "network")
    assert set(loaded) == set(content)
    for name, product in content.items():
        assert name in loaded.tensors[name].storage
        assert loaded.tensors[name].spec.dtype == SPECS[dtype]
        assert loaded[name].dtype == dtype
        for ours, theirs in zip(loaded[name], product, strict=True):
            assert (ours.kind, ours.shape) == (theirs.kind, theirs.shape)
            np.testing.assert_array_equal(ours.toarray(), theirs.toarray())


def test_bfloat16_is_stored_in_two_bytes_and_exactly(tmp_path):
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    product = FactorProduct([SparseFactor.from_dense(torch.where(W > 0, W, 0))])
    save(tmp_path / "network", {"w": product, "b": W})
    loaded = Checkpoint(tmp_path / "network")
    np.testing.assert_array_equal(loaded["w"].toarray(), product.toarray().float().numpy())
    np.testing.assert_array_equal(loaded["b"], W.float().numpy())
    file = loaded.file("w")
    assert file.specs["0.values"].dtype == loaded.tensors["b"].spec.dtype == "BF16"
    assert sum(spec.nbytes for spec in file.specs.values()) == 2 * product.nnz + W.numel() // 8


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 300)),
    density=st.floats(0, 1),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_scattered_values_take_the_smaller_of_two_formats(shape, density, dtype, tmp_path_factory):
    factor = sparse(np.random.RandomState(0), *shape, density, dtype)
    path = tmp_path_factory.mktemp("size") / "network"
    save(path, {"w": FactorProduct([factor])})
    loaded = Checkpoint(path)
    np.testing.assert_array_equal(loaded["w"].toarray(), factor.toarray())
    held = sum(spec.nbytes for spec in loaded.file("w").specs.values())
    assert held <= factor.value_nbytes() + factor.index_nbytes("smallest")


def test_the_size_on_disk_is_that_of_values_and_masks(tmp_path):
    product = FactorProduct([sparse(np.random.RandomState(0), 256, 256, 0.5, np.float16)] * 2)
    save(tmp_path / "network", {f"layer.{i}": product for i in range(5)})
    on_disk = sum(file.stat().st_size for file in (tmp_path / "network").iterdir())
    assert on_disk < 1.03 * 5 * product.nbytes("bitmask")


def test_the_reader_in_the_documentation_agrees(folder, tmp_path):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL).group(1)
    namespace = {}
    exec(compile(code, str(DOCS), "exec"), namespace)
    save(tmp_path / "storages", products(np.float32) | {"b": np.array([True, False])})
    save(tmp_path / "complex", products(np.complex64))
    save(tmp_path / "quantized", quantized_products(np.float32))
    save(tmp_path / "half", quantized_products(np.float16))
    for name in ("storages", "complex", "quantized", "half", VERSION_1):
        path = tmp_path / name
        ours, theirs = Checkpoint(path), namespace["read_checkpoint"](path)
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            expected = value.toarray() if isinstance(value, FactorProduct) else value
            expected = expected.reshape(ours.tensors[name].spec.shape)
            rtol = 1e-3 if expected.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(theirs[name], expected, rtol=rtol, atol=1e-6)


def test_what_version_1_wrote_is_read():
    old = Checkpoint(VERSION_1)
    assert json.loads((VERSION_1 / "manifest.json").read_bytes())["version"] == 1
    assert {"bitmask", "csr", "dense", "kronecker", "blocks", "selection"} < set(old)
    for name in ("bitmask", "dense", "kronecker", "blocks", "selection"):
        product = products(np.float32)[name]
        assert name in old.tensors[name].storage
        np.testing.assert_array_equal(old[name].toarray(), product.toarray())
    assert old.tensors["csr"].storage == ("csr",)
    # What is now stored as gaps was stored so.
    np.testing.assert_array_equal(old["csr"].toarray(), products(np.float32)["gaps"].toarray())
    np.testing.assert_array_equal(old["half"].toarray(), products(np.float16)["bitmask"].toarray())
    np.testing.assert_array_equal(
        old["complex"].toarray(), products(np.complex64)["dense"].toarray()
    )


def test_quantized_networks_become_dense_ones(tmp_path):
    from safetensors.numpy import load_file

    content = quantized_products(np.float32)
    save(tmp_path / "network", content)
    decompress(tmp_path / "network", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    for name, product in content.items():
        np.testing.assert_allclose(dense[name], product.toarray(), rtol=1e-6)


def test_reading_needs_no_torch(folder):
    code = (
        "import sys; from matfact.checkpoint import Checkpoint; "
        f"c = Checkpoint({str(folder)!r}); print(len([c[n] for n in c])); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\nFalse\n"), done.stderr


def test_decompressed_tensors_are_those_of_the_checkpoint(folder, tmp_path):
    from safetensors import safe_open

    decompress(folder, tmp_path / "dense.safetensors")
    loaded = Checkpoint(folder)
    with safe_open(tmp_path / "dense.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(loaded)
        assert file.get_tensor("conv.weight").shape == (4, 2, 3, 3)
        for name, value in loaded.items():
            dense = value.toarray() if isinstance(value, FactorProduct) else value
            found = file.get_tensor(name)
            assert found.dtype == dense.dtype
            np.testing.assert_allclose(found, dense.reshape(found.shape), rtol=1e-6, atol=1e-6)


def use_all(folder, out):
    """Do all that reads a checkpoint."""
    loaded = Checkpoint(folder)
    for name in loaded:
        loaded[name]
    decompress(folder, out)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_no_flipped_bit_goes_unnoticed(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip")
    save(path / "network", {"w": products(np.float32)["bitmask"], "b": np.ones(3)})
    victim = data.draw(st.sampled_from(sorted((path / "network").iterdir())))
    content = bytearray(victim.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(victim))):
        use_all(path / "network", path / "out")
    assert sorted(os.listdir(path)) == ["network"]


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_no_truncated_or_missing_file_goes_unnoticed(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut")
    save(path / "network", {"w": products(np.float32)["csr"], "b": np.ones(3)})
    victim = data.draw(st.sampled_from(sorted((path / "network").iterdir())))
    content = victim.read_bytes()
    victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=re.escape(str(victim))):
        use_all(path / "network", path / "out")
    victim.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(victim.name)):
        use_all(path / "network", path / "out")
    assert sorted(os.listdir(path)) == ["network"]


def forge(folder, change):
    """Rewrite the manifest after `change`, with a checksum that is right."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["sha256"]
    change(content)
    body = json.dumps(content).encode()[1:]
    head, zeros = b'{"sha256":"', b"0" * 64
    digest = hashlib.sha256(head + zeros + b'",' + body).hexdigest().encode()
    path.write_bytes(head + digest + b'",' + body)


def set_in_first_tensor(**fields):
    return lambda content: content["shards"][-1]["tensors"][0].update(fields)


def set_in_last_shard(**fields):
    return lambda content: content["shards"][-1].update(fields)


FORGERIES = {
    "a path upwards": set_in_last_shard(file="../00001.safetensors"),
    "an absolute path": set_in_last_shard(file="/etc/passwd"),
    "another name": set_in_last_shard(file="00001.safetensors\n"),
    "a file twice": set_in_last_shard(file="00000.safetensors"),
    "a size of another type": set_in_last_shard(nbytes=1e9),
    "a checksum of another type": set_in_last_shard(sha256=0),
    "no tensors": set_in_last_shard(tensors=[]),
    "a tensor of another type": set_in_last_shard(tensors=["w"]),
    "a name twice": set_in_first_tensor(name="fc.bias"),
    "an absurd shape": set_in_first_tensor(shape=[1 << 30, 1 << 30]),
    "a shape unlike the factors": set_in_first_tensor(shape=[8, 9]),
    "a flat shape": set_in_first_tensor(shape=[72]),
    "a shape of floats": set_in_first_tensor(shape=[4.0, 18]),
    "an unknown dtype": set_in_first_tensor(dtype="X"),
    "a dtype of integers": set_in_first_tensor(dtype="I8"),
    "a note of another type": set_in_first_tensor(note=3),
    "a storage of another type": set_in_first_tensor(storage=[1]),
    "factors said to be a plain tensor": set_in_first_tensor(storage=[]),
    "another version": lambda content: content.update(version=3),
    "a version that is true": lambda content: content.update(version=True),
    "a version of one point zero": lambda content: content.update(version=1.0),
    "a number that is none": set_in_first_tensor(density=float("nan")),
    "a number without end": lambda content: content["settings"].update(x=float("inf")),
    "another format": lambda content: content.update(format="other"),
    "metadata of another type": lambda content: content.update(metadata={"a": 1}),
    "shards of another type": lambda content: content.update(shards={}),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_manifests_that_lie_are_refused(case, folder, tmp_path):
    forge(folder, FORGERIES[case])
    with pytest.raises(ValueError, match=r"manifest|must|damaged"):
        use_all(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["network"]


def test_empty_files_are_refused_by_name_mapped_or_not(tmp_path):
    save(tmp_path / "n", {"b": np.ones(3)})
    (tmp_path / "n" / "00000.safetensors").write_bytes(b"")
    forge(tmp_path / "n", set_in_last_shard(nbytes=0, sha256=hashlib.sha256(b"").hexdigest()))
    loaded = Checkpoint(tmp_path / "n")
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        loaded.file("b")
    with loaded.reading_ahead(), pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        loaded.file("b")


def test_a_place_that_is_taken_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="path must name"):
        save(folder, {"b": np.ones(3)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "network", products(np.float32))
    assert os.listdir(tmp_path) == []


def test_shapes_must_fit_their_products(tmp_path):
    product = products(np.float32)["csr"]
    with pytest.raises(ValueError, match="shapes must fit"):
        save(tmp_path / "network", {"w": product}, shapes={"w": (9, 10, 10, 9)})
    assert os.listdir(tmp_path) == []
