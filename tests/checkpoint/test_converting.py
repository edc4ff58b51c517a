"""Sparse weights, of compressed-tensors or dense ones with zeros: exact conversions."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import matfact.transformers  # noqa: F401
from matfact import MagnitudePruner, checkpoint
from matfact.checkpoint._source import Source
from matfact.cli import app
from matfact.compare import StoredMatrix, load_weights
from matfact.torch import FactorizedLinear, load_network

#: Networks written by releases of compressed-tensors, and what these releases read back.
RELEASES = Path(__file__).with_name("compressed-tensors")
WRITTEN = sorted(path.name for path in RELEASES.iterdir() if path.is_dir())


def bits(path):
    """Return the bytes of all tensors."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).tolist())
        for name, tensor in load_file(path).items()
    }


def expected(release):
    return RELEASES / f"{release}.dense.safetensors"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("release", WRITTEN)
def test_every_bit_of_a_written_network_is_read(release, tmp_path):
    checkpoint.to_dense(RELEASES / release, tmp_path / "dense")
    assert bits(tmp_path / "dense" / "model.safetensors") == bits(expected(release))
    network = checkpoint.convert(RELEASES / release, tmp_path / "sparse")
    assert sum(tensor.is_product for tensor in network.tensors.values()) >= 3
    for output in ("again", "again.safetensors"):
        checkpoint.to_dense(tmp_path / "sparse", tmp_path / output)
    assert bits(tmp_path / "again" / "model.safetensors") == bits(expected(release))
    assert bits(tmp_path / "again.safetensors") == bits(expected(release))


@pytest.mark.parametrize("release", WRITTEN)
def test_a_written_network_computes_the_same_from_sparse_factors(release, tmp_path):
    checkpoint.to_dense(RELEASES / release, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    checkpoint.convert(RELEASES / release, tmp_path / "sparse")
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    build = lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # noqa: E731
    sparse = load_network(build, tmp_path / "sparse").eval()
    assert any(isinstance(layer, FactorizedLinear) for layer in sparse.modules())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits)
        assert torch.equal(read(tokens).logits, sparse(tokens).logits)
    assert dict(classes(read)) == dict(classes(sparse))


def classes(model):
    return ((name, type(module)) for name, module in model.named_modules())


def test_what_was_compressed_from_a_sparse_format_is_read_by_transformers(tmp_path):
    pruner = MagnitudePruner(density=0.2)
    checkpoint.compress(RELEASES / "bitmask-0.9.4", tmp_path / "small", pruner)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(isinstance(layer, FactorizedLinear) for layer in model.modules()) == 7


def test_what_save_pretrained_wrote_is_refused_with_what_reads_it(tmp_path):
    source = folder_with(tmp_path, {"quantization_config": {"quant_method": "matfact"}})
    for write in (checkpoint.convert, checkpoint.to_dense):
        with pytest.raises(ValueError, match=r"load it with from_pretrained\."):
            write(source, tmp_path / "out")


def test_compressing_reads_masked_weights_like_dense_ones(tmp_path):
    pruner = MagnitudePruner(density=0.2)
    masked = checkpoint.compress(RELEASES / "bitmask-0.9.4", tmp_path / "masked", pruner)
    dense = checkpoint.compress(expected("bitmask-0.9.4"), tmp_path / "dense", pruner)
    assert masked.tensors == dense.tensors
    assert sum(tensor.is_product for tensor in masked.tensors.values()) == 7
    for name, tensor in masked.tensors.items():
        if tensor.is_product:
            np.testing.assert_array_equal(masked[name].toarray(), dense[name].toarray())


def test_a_mask_that_was_coded_may_be_written_to(tmp_path):
    groups = torch.randn(40, 16, 4)
    W = groups.scatter(2, groups.abs().argsort(dim=2)[:, :, :2], 0.0).reshape(40, 64)
    save_file({"0.weight": W}, tmp_path / "m.safetensors")
    product = checkpoint.convert(tmp_path / "m.safetensors", tmp_path / "out")["0.weight"]
    assert product.factors[0].bits.flags.writeable  # as load_state_dict does
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = load_network(nn.Sequential(nn.Linear(64, 40, bias=False)), tmp_path / "out")
    assert isinstance(layer[0], FactorizedLinear)
    torch.testing.assert_close(layer(torch.eye(64)).T, W)


@pytest.mark.parametrize("stored", [False, True])
def test_comparing_reads_masked_weights_like_dense_ones(stored, tmp_path):
    save_file(parts(), tmp_path / "m.safetensors")
    (matrix,) = load_weights(tmp_path / "m.safetensors", stored=stored).values()
    if stored:
        matrix = pickle.loads(pickle.dumps(matrix)).window(slice(0, 2), slice(1, 9)).read()
        np.testing.assert_array_equal(matrix, W[:, 1:9].numpy())
        again = StoredMatrix(tmp_path / "m.safetensors", "fc.weight")
        np.testing.assert_array_equal(again.read(), W.numpy())
    else:
        np.testing.assert_array_equal(matrix, W.numpy())


def test_the_configuration_of_a_checkpoint_is_that_of_dense_weights_later(tmp_path):
    checkpoint.convert(RELEASES / "bitmask-0.9.4", tmp_path / "out")
    config = {"hidden_size": 16, "quantization_config": {"quant_method": "matfact"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    checkpoint.to_dense(tmp_path / "out", tmp_path / "dense")
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"hidden_size": 16}


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


def sparse_weight(dtype, rows=60, columns=70):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, dtype=dtype, generator=generator)
    W[torch.rand(rows, columns, generator=generator) < 0.8] = 0
    W[0, :3] = -torch.zeros(3, dtype=dtype)
    if not dtype.is_complex:
        W[1, 0] = torch.finfo(dtype).smallest_normal / 2
        W[2] = torch.finfo(dtype).max
    return W


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_comes_back(dtype, tmp_path):
    convolution = sparse_weight(dtype, 16, 90).reshape(16, 10, 3, 3)
    W = {"fc.weight": sparse_weight(dtype), "conv.weight": convolution}
    save_file(W, tmp_path / "m.safetensors", metadata={"format": "pt"})
    network = checkpoint.convert(tmp_path / "m.safetensors", tmp_path / "out")
    assert all(network.tensors[name].is_product for name in W)
    assert network.metadata == {"format": "pt"}
    checkpoint.to_dense(tmp_path / "out", tmp_path / "back.safetensors")
    assert bits(tmp_path / "back.safetensors") == bits(tmp_path / "m.safetensors")
    assert torch.signbit(torch.view_as_real(W["fc.weight"])[0, 0] if dtype.is_complex
                         else W["fc.weight"][0, 0]).all()  # fmt: skip


def test_tensors_that_are_not_sparse_weights_stay_with_a_reason(tmp_path):
    W = sparse_weight(torch.float32)
    infinite = W.clone()
    infinite[3, 3] = torch.inf
    tensors = {
        "few.weight": torch.randn(8, 9),
        "infinite.weight": infinite,
        "embed_tokens.weight": W,
        "lm_head.weight": W.clone(),
        "steps": torch.arange(3),
        "sparse.weight": W.flip(0),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    network = checkpoint.convert(tmp_path / "m.safetensors", tmp_path / "out")
    notes = {name: tensor.note for name, tensor in network.tensors.items()}
    assert notes == {
        "few.weight": "too few zeros (0.0%)",
        "infinite.weight": "weight with values that are not finite",
        "embed_tokens.weight": "weight shared with lm_head.weight",
        "lm_head.weight": "weight shared with embed_tokens.weight",
        "steps": "not in a linear layer or convolution",
        "sparse.weight": "",
    }
    checkpoint.to_dense(tmp_path / "out", tmp_path / "back.safetensors")
    assert bits(tmp_path / "back.safetensors") == bits(tmp_path / "m.safetensors")


def test_negative_zeros_of_masked_weights_can_be_dropped(tmp_path):
    masked = torch.randn(40, 50) * (torch.rand(40, 50) < 0.3)
    assert torch.signbit(masked[masked == 0]).any()
    save_file({"fc.weight": masked}, tmp_path / "m.safetensors")
    kept = checkpoint.convert(tmp_path / "m.safetensors", tmp_path / "kept")
    dropped = checkpoint.convert(
        tmp_path / "m.safetensors", tmp_path / "dropped", negative_zeros=False
    )
    assert dropped["fc.weight"].nnz == torch.count_nonzero(masked) < kept["fc.weight"].nnz
    checkpoint.to_dense(dropped.path, tmp_path / "back.safetensors")
    assert torch.equal(load_file(tmp_path / "back.safetensors")["fc.weight"], masked)
    save_file({"fc.weight": torch.where(masked == 0, -0.0, masked)}, tmp_path / "m.safetensors")
    negative = checkpoint.convert(tmp_path / "m.safetensors", tmp_path / "negative")
    assert "of these 100.0% negative" in negative.tensors["fc.weight"].note


def test_interrupted_work_is_resumed(tmp_path):
    source, written = RELEASES / "24-bitmask-0.14.0", []
    whole = checkpoint.convert(source, tmp_path / "whole")

    def stop(shard, total):
        written.append(shard.file)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(source, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written}
    checkpoint.convert(source, tmp_path / "out")
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written}
    assert content(tmp_path / "out") == content(whole.path)


W = torch.tensor([[0, 1.5, 0, 0, 0, 0, 0, 0, 2.0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 3.0]])


def parts():
    packed = np.packbits(W.numpy() != 0, axis=-1, bitorder="little")
    return {
        "fc.compressed": W[W != 0],
        "fc.bitmask": torch.from_numpy(packed),
        "fc.shape": torch.tensor([2, 10]),
        "fc.row_offsets": torch.tensor([0, 2]),
        "fc.bias": torch.ones(2),
    }


def mask_with(row, byte, bit):
    mask = parts()["fc.bitmask"]
    mask[row, byte] |= bit
    return mask


DAMAGE = {
    "no mask": ({"fc.bitmask": None}, "lacks bitmask"),
    "no shape": ({"fc.shape": None}, "lacks shape"),
    "no values": ({"fc.compressed": None}, "lacks compressed"),
    "stored twice": ({"fc.weight": W}, "stored once"),
    "another shape": ({"fc.shape": torch.tensor([2, 17])}, r"fc\.bitmask.*must be U8"),
    "a huge shape": ({"fc.shape": torch.tensor([2**40, 2**40])}, r"fc\.bitmask.*must be U8"),
    "a negative shape": ({"fc.shape": torch.tensor([-2, 10])}, r"fc\.shape.*sizes of a tensor"),
    "no sizes": ({"fc.shape": torch.zeros(0, dtype=torch.int64)}, r"fc\.shape.*sizes"),
    "a floating shape": ({"fc.shape": torch.tensor([2.0, 10.0])}, r"fc\.shape.*I64"),
    "a long shape": ({"fc.shape": torch.ones(9, dtype=torch.int64)}, r"fc\.shape.*8 sizes"),
    "too few values": ({"fc.compressed": torch.ones(2)}, r"fc\.bitmask.*3 bits for 2 values"),
    "too many values": ({"fc.compressed": torch.ones(4)}, r"fc\.bitmask.*3 bits for 4 values"),
    "bits after the row": ({"fc.bitmask": mask_with(0, 1, 4)}, r"fc\.bitmask.*last column"),
    "other offsets": ({"fc.row_offsets": torch.tensor([0, 1])}, r"fc\.row_offsets.*contradicts"),
    "short offsets": ({"fc.row_offsets": torch.tensor([0])}, r"fc\.row_offsets.*I64"),
    "not half": ({"fc.row_offsets": None}, r"fc\.compressed.*half"),
    "float8": ({"fc.compressed": torch.ones(3).to(torch.float8_e4m3fn)}, "fc.compressed.*F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_are_refused_by_name(damage, tmp_path):
    changes, message = DAMAGE[damage]
    held = {name: tensor for name, tensor in (parts() | changes).items() if tensor is not None}
    save_file(held, tmp_path / "m.safetensors")
    for write in (checkpoint.convert, checkpoint.to_dense):
        with pytest.raises(ValueError, match=message) as error:
            write(tmp_path / "m.safetensors", tmp_path / "out")
        assert "m.safetensors" in str(error.value)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert not (tmp_path / "out" / "model.safetensors").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_undamaged_parts_are_read(tmp_path):
    save_file(parts(), tmp_path / "m.safetensors")
    checkpoint.to_dense(tmp_path / "m.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert dense.keys() == {"fc.weight", "fc.bias"}
    assert torch.equal(dense["fc.weight"], W)


def test_workers_read_a_masked_weight_from_its_parts(tmp_path):
    save_file(parts(), tmp_path / "m.safetensors")
    network = Source(tmp_path / "m.safetensors")
    network.digests()
    location = pickle.loads(pickle.dumps(network.location("fc.weight").absolute()))
    assert location.files == (tmp_path / "m.safetensors",)
    np.testing.assert_array_equal(location.read(), W.numpy())
    assert b"".join(location.chunks()) == W.numpy().tobytes()
    save_file(parts() | {"fc.compressed": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"must stay as it is .*'fc\.compressed'"):
        location.read()


def test_a_tensor_that_only_has_such_a_name_is_no_mask(tmp_path):
    save_file({"fc.bitmask": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint.to_dense(tmp_path / "m.safetensors", tmp_path / "dense.safetensors")
    assert bits(tmp_path / "dense.safetensors") == bits(tmp_path / "m.safetensors")


def folder_with(tmp_path, config):
    save_file({"fc.weight": sparse_weight(torch.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


SPARSE = {"sparsity_config": {"format": "sparse-bitmask"}}
QUANTIZED = {
    "format": ({"quantization_config": {"format": "pack-quantized"}}, "pack-quantized"),
    "method": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "both": ({"compression_config": {"format": "float-quantized"} | SPARSE}, "float-quantized"),
    "sparse": ({"quantization_config": {"sparsity_config": {"format": "marlin-24"}}}, "marlin-24"),
    "early": ({"sparsity_config": {"format": "marlin-24"}}, "marlin-24"),
    "transforms": ({"quantization_config": {"transform_config": {"R1": {}}}}, "transform_config"),
    "no object": ({"quantization_config": 3}, "quantization_config is 3"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_configuration_of_quantized_weights_is_refused(kind, tmp_path):
    config, named = QUANTIZED[kind]
    source = folder_with(tmp_path, config)
    for write in (checkpoint.convert, checkpoint.to_dense):
        with pytest.raises(ValueError, match=rf"config\.json.*{named}"):
            write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert checkpoint.convert(source / "model.safetensors", tmp_path / "out").tensors


@pytest.mark.parametrize(
    "config", [SPARSE, {"quantization_config": SPARSE}, {"compression_config": SPARSE}]
)
def test_a_folder_becomes_one_of_dense_weights(config, tmp_path):
    source = folder_with(tmp_path, config | {"hidden_size": 70})
    (source / "tokenizer.json").write_text("{}")
    (source / "training.bin").write_bytes(b"\0")
    checkpoint.to_dense(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 70}
    with pytest.raises(FileExistsError, match="new or empty folder"):
        checkpoint.to_dense(source, tmp_path / "out")


def test_what_is_read_is_never_written(tmp_path):
    source = folder_with(tmp_path, {})
    before = content(source)
    for given in (source, source / "model.safetensors"):
        with pytest.raises(ValueError, match=r"must differ from .*model\.safetensors"):
            checkpoint.to_dense(given, source / "model.safetensors")
    assert content(source) == before


def test_a_checkpoint_is_not_converted_again(tmp_path):
    checkpoint.convert(RELEASES / "bitmask-0.9.4", tmp_path / "out")
    with pytest.raises(ValueError, match="must not be a checkpoint already"):
        checkpoint.convert(tmp_path / "out", tmp_path / "again")


def test_the_command_converts_both_ways(tmp_path):
    source = RELEASES / "24-bitmask-0.14.0"
    result = invoke("convert", source, tmp_path / "sparse")
    assert result.exit_code == 0, result.output
    assert "11 tensors, 7 of them factorized; 10," in result.output
    assert content(tmp_path / "sparse") == content(
        checkpoint.convert(source, tmp_path / "python").path
    )
    result = invoke("convert", tmp_path / "sparse", tmp_path / "dense", "--to", "dense")
    assert result.exit_code == 0, result.output
    assert bits(tmp_path / "dense" / "model.safetensors") == bits(expected(source.name))


def test_the_command_tells_what_is_wrong(tmp_path):
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    result = invoke("convert", tmp_path / "m.safetensors", tmp_path / "out")
    assert result.exit_code == 3
    assert "fc.weight: too few zeros (0.0%)" in result.output
    result = invoke("convert", tmp_path / "missing", tmp_path / "other")
    assert result.exit_code == 2
    assert "Error" in result.output
