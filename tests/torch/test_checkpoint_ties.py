"""Checkpoints with other names than the network: tied weights, buffers it creates."""

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file, save_model  # noqa: E402
from torch import nn  # noqa: E402

from matfact import LowRank, checkpoint  # noqa: E402
from matfact.torch import compress, load_network, save_network  # noqa: E402

HALF = LowRank(density=0.5)


class LanguageModel(nn.Module):
    """An output layer tied to the embeddings, and positions that are not part of the state."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.up = nn.Embedding(60, 32), nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 60, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(9)[None], persistent=False)

    def forward(self, tokens):
        return self.lm_head(
            self.up(self.embed(tokens) + self.positions[:, : tokens.shape[-1], None])
        )


TOKENS = torch.arange(6)[None]


def made(seed, tied=True):
    torch.manual_seed(seed)
    return LanguageModel(tied)


def compressed(content, tmp_path, **options):
    save_file(content, tmp_path / "m.safetensors")
    return checkpoint.compress(tmp_path / "m.safetensors", tmp_path / "out", HALF, **options).path


@pytest.mark.parametrize("build", [lambda: made(1), lambda: lambda: made(1)])
@pytest.mark.parametrize("dropped", ["noted", "lm_head.weight", "embed.weight"])
def test_names_that_the_network_ties_to_others_may_be_missing(dropped, build, tmp_path):
    model = made(0)
    if dropped == "noted":
        save_model(model, str(tmp_path / "m.safetensors"))
        path = checkpoint.compress(tmp_path / "m.safetensors", tmp_path / "out", HALF).path
    else:
        state = {k: v.clone() for k, v in model.state_dict().items() if k != dropped}
        path = compressed(state, tmp_path)
    loaded = load_network(build(), path)
    expected = checkpoint.Checkpoint(path)
    if dropped == "embed.weight":  # nothing in the file tells that the output layer is tied
        table = torch.from_numpy(expected["lm_head.weight"].toarray())
        torch.testing.assert_close(loaded.embed.weight, table)
        torch.testing.assert_close(loaded.lm_head.weight, table, rtol=1e-4, atol=1e-5)
    else:
        assert loaded.lm_head.weight is loaded.embed.weight
        assert torch.equal(loaded.embed.weight, model.embed.weight)
    with pytest.raises(ValueError, match="lacks"):
        load_network(made(1, tied=False), path)


def test_both_of_two_tied_names_must_have_one_value(tmp_path):
    model = made(0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = compressed(state, tmp_path, layers="up")
    loaded = load_network(made(1), path)
    assert loaded.lm_head.weight is loaded.embed.weight
    assert torch.equal(loaded.embed.weight, model.embed.weight)
    save_network(made(2, tied=False), tmp_path / "untied")
    other = made(1)
    before = other.embed.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'embed.weight' and 'lm_head.weight' differ"):
        load_network(other, tmp_path / "untied")
    assert torch.equal(other.embed.weight, before)


def test_factors_under_two_names_of_one_layer_must_be_the_same(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32, bias=False)
            self.again = self.first

    weight = torch.randn(32, 32)
    path = compressed({"first.weight": weight, "again.weight": weight.clone()}, tmp_path)
    loaded = load_network(Twice(), path)
    assert loaded.first is loaded.again
    save_file({"first.weight": weight, "again.weight": -weight}, tmp_path / "two.safetensors")
    checkpoint.compress(tmp_path / "two.safetensors", tmp_path / "two", HALF)
    with pytest.raises(ValueError, match="differ"):
        load_network(Twice(), tmp_path / "two")


def test_buffers_that_the_network_makes_itself_may_be_there(tmp_path):
    model = made(0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    path = compressed(state | {"positions": model.positions}, tmp_path)
    assert torch.equal(load_network(made(1), path).positions, model.positions)
    load_network(lambda: made(1), path)
    for i, other in enumerate((model.positions + 1, model.positions[:, :8].clone())):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        path = compressed(state | {"positions": other}, folder)
        with pytest.raises(ValueError, match="also has positions"):
            load_network(made(1), path)
        load_network(made(1), path, strict=False)


def test_a_network_without_parameters_and_empty_ones_are_saved(tmp_path):
    save_network(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False)), tmp_path / "buffers")
    loaded = load_network(
        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False)), tmp_path / "buffers"
    )
    assert torch.equal(loaded[1].running_mean, torch.zeros(3))
    model = nn.Sequential(nn.Embedding(0, 3), nn.Linear(3, 2))
    save_network(model, tmp_path / "empty")
    other = nn.Sequential(nn.Embedding(0, 3), nn.Linear(3, 2))
    assert torch.equal(load_network(other, tmp_path / "empty")[1].bias, model[1].bias)


def test_a_pretrained_encoder_written_by_the_command_line_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # as files of earlier versions of the library hold it
    path = compressed(state | {"embeddings.position_ids": torch.arange(16)[None]}, tmp_path)
    loaded = load_network(lambda: transformers.AutoModel.from_config(config), path).eval()
    tokens = torch.arange(5)[None]
    expected = model(tokens).last_hidden_state
    error = (loaded(tokens).last_hidden_state - expected).norm() / expected.norm()
    assert 0 < error < 0.5
    kept = checkpoint.Checkpoint(path).tensors
    assert all("embedding" in kept[n].note for n in kept if n.startswith("embeddings.word"))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (torch.complex64, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.int64),
        (torch.int64, torch.float32),
        (torch.int64, torch.int32),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_no_number_is_lost_in_another_dtype(there, here, tmp_path):
    def build(dtype):
        layer = nn.Linear(2, 2, bias=False)
        layer.register_buffer("numbers", torch.ones(4).to(dtype))
        return nn.Sequential(layer)

    save_network(build(there), tmp_path / "network")
    with pytest.raises(ValueError, match=f"'0.numbers' is {there} there and {here} here"):
        load_network(build(here), tmp_path / "network")


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_networks_may_be_loaded_in_the_dtype_that_is_wanted(there, here, tmp_path):
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24)).to(there)
    model, _ = compress(model, "lowrank", density=0.5, layers="0")
    save_network(model, tmp_path / "network")
    full = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24)).to(here)
    loaded = load_network(full, tmp_path / "network")
    assert {p.dtype for p in loaded.parameters()} == {here}
    tolerance = max(torch.finfo(dtype).eps for dtype in (there, here))
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name].double()
        torch.testing.assert_close(found, tensor.double(), rtol=tolerance, atol=1e-7)


def test_factors_must_fit_the_dtype_too(tmp_path):
    double = nn.Sequential(nn.Linear(16, 24)).double()
    model, _ = compress(double, "lowrank", density=0.5)
    save_network(model, tmp_path / "network")
    with pytest.raises(ValueError, match=r"'0\.weight' is torch.float64"):
        load_network(nn.Sequential(nn.Linear(16, 24)), tmp_path / "network")
