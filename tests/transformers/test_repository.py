"""Repositories compressed file by file."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

import matfact.transformers  # noqa: E402, F401
from matfact import MagnitudePruner  # noqa: E402
from matfact.checkpoint import Checkpoint, _compress, compress, decompress  # noqa: E402
from matfact.cli import app  # noqa: E402
from matfact.torch import FactorizedLinear  # noqa: E402
from tests.wild.architectures import ARCHITECTURES  # noqa: E402

HALF = MagnitudePruner(density=0.5)
#: With old names in files, transposed weights, experts, groups, and layers with other forwards.
NAMES = ["gpt2", "bert", "t5", "vit", "mixtral", "squeezebert", "falcon"]


def build(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


@torch.no_grad()
def output(model, name):
    return model(**ARCHITECTURES[name].batch(torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_reads_what_was_compressed(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    compress(tmp_path / "dense", tmp_path / "small", HALF)
    small = type(model).from_pretrained(tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again.safetensors")
    (tmp_path / "again").mkdir()
    (tmp_path / "again.safetensors").rename(tmp_path / "again" / "model.safetensors")
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "dense/config.json").read_bytes())
    expected = output(type(model).from_pretrained(tmp_path / "again"), name)
    torch.testing.assert_close(output(small, name), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, output(model, name))
    small.save_pretrained(tmp_path / "resaved")
    third = type(model).from_pretrained(tmp_path / "resaved")
    assert torch.equal(output(third, name), output(small, name))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "dense"
    build("llama").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "train.py"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    (folder / "pytorch_model.bin").write_bytes(b"\0")
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_command_copies_tokenizers_and_configurations(source, tmp_path):
    out = tmp_path / "small"
    result = CliRunner().invoke(
        app, ["compress", str(source), str(out), "--method", "magnitude", "--layers", "proj"]
    )
    assert result.exit_code == 0, result.output
    before, after = content(source), content(out)
    copied = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "generation_config.json", "1_Pooling/config.json")  # fmt: skip
    for name in copied:
        assert after[name] == before[name]
    assert not {"train.py", "pytorch_model.bin"} & after.keys()
    config = json.loads(after["config.json"])
    assert len(config.pop("quantization_config")["layers"]) == 14
    assert config == json.loads(before["config.json"])
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert sum(isinstance(module, FactorizedLinear) for module in model.modules()) == 14
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "14 of them factorized" in shown.output


def test_stopped_work_resumes_to_the_same_bytes(source, tmp_path, monkeypatch):
    compress(source, tmp_path / "whole", HALF)
    calls = []
    factorize = _compress._factorize

    def stopping(tensor, path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return factorize(tensor, path, **options)

    monkeypatch.setattr(_compress, "_factorize", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "parts", HALF)
    assert not (tmp_path / "parts" / "config.json").exists()
    compress(source, tmp_path / "parts", HALF)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_the_output_may_lie_in_the_repository(source):
    compress(source, source / "small", HALF)
    assert not (source / "small" / "small").exists()


def test_another_configuration_is_other_work(source, tmp_path):
    compress(source, tmp_path / "small", HALF)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ValueError, match="other options or weights"):
        compress(source, tmp_path / "small", HALF)


def test_embeddings_and_experts_are_kept_even_if_requested(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "dense")
    network = compress(tmp_path / "dense", tmp_path / "small", HALF, layers="embed|expert|q_proj")
    notes = {name: tensor.note for name, tensor in network.tensors.items()}
    assert not notes["model.layers.0.self_attn.q_proj.weight"]
    assert "requested, but not in a linear" in notes["model.embed_tokens.weight"]
    experts = [note for name, note in notes.items() if ".experts." in name]
    assert experts
    assert all("transformers merges" in note for note in experts)


def test_what_transformers_splits_is_kept(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = transformers.Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    network = compress(tmp_path / "dense", tmp_path / "small", HALF)
    split = [name for name in network.tensors if name.endswith("weights_in.weight")]
    assert split
    assert all("transformers splits" in network.tensors[name].note for name in split)
    small = type(model).from_pretrained(tmp_path / "small")
    assert any(isinstance(module, FactorizedLinear) for module in small.modules())
    split = [name for name, _ in model.named_parameters() if "gate_proj.w" in name]
    assert split
    assert all(torch.equal(small.get_parameter(n), model.get_parameter(n)) for n in split)


def test_what_was_compressed_is_not_compressed_again(source, tmp_path):
    compress(source, tmp_path / "small", HALF)
    with pytest.raises(ValueError, match="was compressed by matfact"):
        compress(tmp_path / "small", tmp_path / "smaller", HALF)


def test_damaged_configurations_are_refused_before_any_work(source, tmp_path):
    (source / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json must be a JSON object"):
        compress(source, tmp_path / "small", HALF)
    assert not (tmp_path / "small").exists()


def test_products_of_a_repository_are_those_of_its_file(source, tmp_path):
    """Which are only wrapped into tensors of bytes."""
    small = compress(source, tmp_path / "small", HALF)
    plain = compress(source / "model.safetensors", tmp_path / "plain", HALF)
    for name, tensor in plain.tensors.items():
        assert small.tensors[name] == tensor
        if tensor.is_product:
            wrapped, product = small[name], Checkpoint(tmp_path / "plain")[name]
            assert (wrapped.toarray() == product.toarray()).all()
