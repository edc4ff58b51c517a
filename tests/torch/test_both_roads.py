"""A network in memory and its file: the same layers are factorized, for the same reasons."""

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
from safetensors.torch import save_model  # noqa: E402
from torch import nn  # noqa: E402

from matfact.checkpoint import Checkpoint  # noqa: E402
from matfact.cli import app  # noqa: E402
from matfact.torch import compress  # noqa: E402


def with_weight(layer, weight, **others):
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    for name, tensor in others.items():
        layer.register_buffer(name, tensor)
    return layer


def not_finite():
    layer = nn.Linear(32, 32)
    layer.weight.data[3, 4] = torch.nan
    return layer


def one_bias(*layers):
    for layer in layers[1:]:
        layer.bias = layers[0].bias
    return nn.ModuleList(layers)


class Network(nn.Module):
    """One layer of each kind; it is never called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.unbiased = nn.Linear(32, 32, bias=False)
        self.rounded = nn.Linear(32, 32, dtype=torch.bfloat16)
        self.conv1 = nn.Conv1d(8, 16, 3)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.conv3 = nn.Conv3d(4, 16, 3)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.embed, self.token_embedding = nn.Embedding(50, 32), nn.Embedding(50, 32)
        self.norm = nn.LayerNorm((4, 32), bias=False)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.embed.weight
        self.again = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        for layer in self.again[1:]:
            layer.weight = self.again[0].weight
        self.one_bias = one_bias(nn.Linear(32, 32), nn.Linear(32, 32))
        self.masked_bias = nn.Linear(32, 32)
        nn.utils.prune.l1_unstructured(self.masked_bias, "bias", amount=0.5)
        self.int8 = with_weight(nn.Linear(32, 32), torch.ones(32, 32, dtype=torch.int8))
        packed = torch.ones(512, 1).byte()
        self.packed = with_weight(nn.Linear(32, 32), packed, absmax=torch.ones(4))
        float8 = torch.ones(32, 32).to(torch.float8_e4m3fn)
        self.float8 = with_weight(nn.Linear(32, 32), float8, scale=torch.ones(1))
        W = torch.randn(32, 32)
        self.scaled = with_weight(nn.Linear(32, 32), W, weight_scale=torch.ones(1))
        self.gain = with_weight(nn.Linear(32, 32), W.clone(), gain=torch.ones(3))
        self.adapted = nn.Linear(32, 32)
        self.adapted.lora = nn.ModuleDict({"A": nn.Linear(32, 16), "B": nn.Linear(16, 32)})
        self.twice = with_weight(nn.Linear(32, 32), torch.randn(32, 32), weight_mask=torch.ones(1))
        self.odd_bias = nn.Linear(32, 32)
        self.odd_bias.bias = nn.Parameter(torch.ones(4, 1))
        self.empty = with_weight(nn.Linear(1, 32), torch.ones(32, 0))
        self.not_finite = not_finite()
        self.complex = nn.Linear(32, 32, dtype=torch.complex64)
        self.attention = nn.MultiheadAttention(32, 4)
        self.register_buffer("mask", torch.ones(32, 32).tril())


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """The report of the network, and the checkpoint of its file."""
    torch.manual_seed(0)
    model, folder = Network(), tmp_path_factory.mktemp("roads")
    save_model(model, str(folder / "model.safetensors"))
    with pytest.warns(UserWarning, match="not_finite|complex"):
        report = compress(model, "magnitude", density=0.5).report
    paths = [str(folder / "model.safetensors"), str(folder / "out")]
    result = CliRunner().invoke(app, ["compress", *paths, "--method", "magnitude"])
    assert result.exit_code == 0, result.output
    return report, Checkpoint(folder / "out").tensors


#: Reasons of the kept layers; all other weights are factorized.
KEPT = {
    "head": "weight shared with embed.weight",
    "again.0": "weight shared with again.1.weight",
    "one_bias.0": "bias shared with one_bias.1.bias",
    "one_bias.1": "bias shared with one_bias.0.bias",
    "int8": "weight of dtype int8",
    "packed": "weight of dtype uint8",
    "float8": "weight of dtype float8_e4m3fn",
    "scaled": "layer with more than a weight and a bias: weight_scale",
    "gain": "layer with more than a weight and a bias: gain",
    "adapted": "layer with more than a weight and a bias: lora",
    "twice": "layer with more than a weight and a bias: weight_mask",
    "odd_bias": "bias of shape (4, 1)",
    "empty": "weight without entries",
    "not_finite": "weight with values that are not finite",
    "complex": "W must be real. Complex data not supported: got complex64.",
}


def test_the_same_layers_are_factorized_for_the_same_reasons(roads):
    report, tensors = roads
    rows = {f"{row.layer}.weight": row for row in report}
    left_out = rows.keys() - tensors.keys()  # safetensors writes shared tensors once
    assert left_out == {"again.1.weight", "again.2.weight", "head.weight"} - tensors.keys()
    assert {row.layer: row.message for row in report if row.status == "kept"} == {
        **KEPT, "again.1": "weight shared with again.0.weight",
        "again.2": "weight shared with again.0.weight",
    }  # fmt: skip
    for name in rows.keys() - left_out:
        row, tensor = rows[name], tensors[name]
        assert tensor.is_product == (row.status == "compressed"), name
        assert tensor.note == row.message


def test_what_is_in_no_layer_is_told_by_both(roads):
    report, tensors = roads
    untouched = report.metadata["untouched"].keys()
    assert untouched == {"token_embedding.weight", "norm.weight", "attention.in_proj_weight"}
    (said,) = report.untouched()
    for name in untouched:
        assert tensors[name].note.startswith("not in a linear layer or convolution")
    assert said.startswith("not in a linear layer or convolution")


@pytest.mark.parametrize("layer", [nn.Linear(32, 32), nn.Conv2d(4, 8, 3)])
def test_what_only_a_network_can_compute_is_said_of_the_file(layer, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": layer})
    nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)
    save_model(model, str(tmp_path / "m.safetensors"))
    assert {row.status for row in compress(model, "magnitude").report} == {"compressed"}
    CliRunner().invoke(app, ["compress", str(tmp_path / "m.safetensors"), str(tmp_path / "out")])
    tensors = Checkpoint(tmp_path / "out").tensors
    assert tensors["a.weight"].is_product
    for name in ("b.weight_orig", "b.weight_mask"):
        assert tensors[name].note == "used to compute the weight of a layer"


def test_weights_on_meta_which_no_file_holds_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16, device="meta")})
    with pytest.raises(ValueError, match="'b' is on the meta device"):
        compress(model, "magnitude")
    _, report = compress(model, "magnitude", overrides={"b": None})
    assert {row.layer: row.outcome for row in report} == {
        "a": "MagnitudePruner", "b": "kept: as requested",
    }  # fmt: skip
