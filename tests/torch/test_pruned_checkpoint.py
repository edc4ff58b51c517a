"""Networks pruned to masks or to fewer units: saved small, and loaded into the full network."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune as torch_prune  # noqa: E402

from matfact.checkpoint import Checkpoint  # noqa: E402
from matfact.torch import compress, load_network, save_network  # noqa: E402
from matfact.torch.neurons import prune_neurons  # noqa: E402
from matfact.torch.pruning import prune_network, to_torch_prune  # noqa: E402


class Conv1D(nn.Module):
    """A layer with a transposed weight, as in the GPT-2 of `transformers`."""

    __module__ = "transformers.pytorch_utils"  # whose class is meant

    def __init__(self, n_outputs, n_inputs):
        super().__init__()
        self.nf, self.nx = n_outputs, n_inputs
        self.weight = nn.Parameter(torch.randn(n_inputs, n_outputs) / n_inputs**0.5)
        self.bias = nn.Parameter(torch.randn(n_outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def mlp(width=64):
    layers = nn.Linear(16, width), nn.BatchNorm1d(width), nn.PReLU(width), nn.Linear(width, 48)
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(48, 4, bias=False)).eval()


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=4, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, padding=1), nn.Conv2d(32, 48, 3, bias=False), nn.ReLU(),
        nn.Conv2d(48, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip


def transposed():
    return nn.Sequential(Conv1D(64, 16), nn.GELU(), Conv1D(64, 64), nn.GELU(), Conv1D(16, 64))


INPUTS = {mlp: (8, 16), cnn: (2, 3, 6, 6), transposed: (8, 16)}


def made(build, seed=0):
    torch.manual_seed(seed)
    return build()


def inputs(build):
    return torch.randn(INPUTS[build], generator=torch.Generator().manual_seed(1))


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def assert_loads(model, build, folder):
    """Save, and load into the network as its code builds it, and into one without memory."""
    before = copy.deepcopy(model.state_dict())
    save_network(model, folder)
    after = model.state_dict()
    assert list(after) == list(before)
    x = inputs(build)
    for into in (made(build, 1), lambda: made(build, 1)):
        loaded = load_network(into, folder).eval()
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    return loaded


@pytest.mark.parametrize("build", INPUTS)
@pytest.mark.parametrize("masks", ["ours", "of torch"])
def test_a_masked_network_is_stored_small_and_loads(build, masks, tmp_path):
    model = made(build)
    save_network(model, tmp_path / "dense")
    weights = lambda module, name: name == "weight" and module.weight.ndim > 1  # noqa: E731
    prune_network(model, "magnitude", keep=0.1, scope="layer", prunable=weights)
    if masks == "of torch":
        to_torch_prune(model)
        model(inputs(build))
    kinds = [type(module) for module in model.modules()]
    assert_loads(model, build, tmp_path / "pruned")
    assert [type(module) for module in model.modules()] == kinds
    assert size(tmp_path / "pruned") < 0.6 * size(tmp_path / "dense")


def test_masks_that_leave_most_values_take_no_more_than_all(tmp_path):
    model = made(mlp)
    save_network(model, tmp_path / "dense")
    prune_network(model, "magnitude", keep=0.999)
    assert_loads(model, mlp, tmp_path / "pruned")
    assert not any(tensor.is_product for tensor in Checkpoint(tmp_path / "pruned").tensors.values())
    assert size(tmp_path / "pruned") <= 1.01 * size(tmp_path / "dense")


def test_masks_on_biases_and_of_nothing_are_kept(tmp_path):
    model = made(mlp)
    torch_prune.random_unstructured(model[0], "bias", amount=0.5)
    torch_prune.custom_from_mask(model[5], "weight", torch.zeros(4, 48))
    loaded = assert_loads(model, mlp, tmp_path / "pruned")
    assert torch.equal(loaded[0].bias, model[0].bias)
    assert not loaded[5].weight.any()


def test_a_pruned_network_can_be_loaded_into_one_that_is_pruned(tmp_path):
    model, other = made(mlp), made(mlp, 1)
    prune_network(model, "magnitude", keep=0.2)
    save_network(model, tmp_path / "pruned")
    prune_network(other, "random", keep=0.5, prunable=lambda module, name: True, random_state=0)
    x = inputs(mlp)
    torch.testing.assert_close(load_network(other, tmp_path / "pruned")(x), model(x))


def test_pruned_factors_are_stored_without_what_is_pruned(tmp_path):
    for method in ("dsf", "lowrank"):
        model, _ = compress(made(mlp), method, density=0.5)
        save_network(model, tmp_path / f"{method} before")
        prune_network(model, "magnitude", keep=0.3, scope="layer")
        assert_loads(model, mlp, tmp_path / method)
        factorized = [t for t in Checkpoint(tmp_path / method).tensors.values() if t.is_product]
        before = Checkpoint(tmp_path / f"{method} before")
        kept = sum(Checkpoint(tmp_path / method)[tensor.name].nnz for tensor in factorized)
        assert 0 < kept <= 0.3 * sum(before[tensor.name].nnz for tensor in factorized)


def test_a_masked_weight_that_is_also_read_elsewhere_keeps_both_values(tmp_path):
    def build():
        model = nn.ModuleDict({"table": nn.Embedding(60, 32), "head": nn.Linear(32, 60)})
        model["head"].weight = model["table"].weight
        return model

    model = made(build)
    torch_prune.l1_unstructured(model["head"], "weight", amount=0.5)  # and not the table
    save_network(model, tmp_path / "pruned")
    loaded = load_network(made(build, 1), tmp_path / "pruned")
    assert model["table"].weight.all()
    assert torch.equal(loaded["table"].weight, model["table"].weight)
    x = torch.randn(3, 32)
    torch.testing.assert_close(loaded["head"](x), model["head"](x))


@pytest.mark.parametrize("first", ["table", "head"])
def test_a_mask_that_modules_share_is_stored_once(first, tmp_path):
    def build():
        layers = {"table": nn.Embedding(60, 32), "head": nn.Linear(32, 60, bias=False)}
        layers["head"].weight = layers["table"].weight
        return nn.ModuleDict({first: layers.pop(first)} | layers)

    model = made(build)
    torch_prune.l1_unstructured(model["table"], "weight", amount=0.5)
    del model["head"]._parameters["weight"]  # both read the same, through the same mask
    model["head"].register_parameter("weight_orig", model["table"].weight_orig)
    model["head"].register_buffer("weight_mask", model["table"].weight_mask)
    model["head"].weight = model["table"].weight
    save_network(model, tmp_path / "pruned")
    assert list(Checkpoint(tmp_path / "pruned")) == [f"{first}.weight"]
    loaded = load_network(made(build, 1), tmp_path / "pruned")
    expected = model["table"].weight
    torch.testing.assert_close(loaded["table"].weight, expected)
    torch.testing.assert_close(loaded["head"](torch.eye(32)), expected.T)


def neurons(build, model=None, keep=0.5):
    batches = [torch.randn(64, *INPUTS[build][1:], generator=torch.Generator().manual_seed(2))]
    return prune_neurons(made(build) if model is None else model, batches, n_neurons=keep).model


@pytest.mark.parametrize("build", INPUTS)
def test_a_network_with_fewer_units_loads_into_the_full_one(build, tmp_path):
    save_network(made(build), tmp_path / "dense")
    model = neurons(build)
    loaded = assert_loads(model, build, tmp_path / "pruned")
    assert size(tmp_path / "pruned") < size(tmp_path / "dense")
    assert str(loaded) == str(model)  # the widths that modules tell of themselves
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    save_network(loaded, tmp_path / "again")
    full = load_network(made(build, 3), tmp_path / "again").eval()
    x = inputs(build)
    torch.testing.assert_close(full(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_units_removed_twice_masked_and_factorized_load_all_the_same(tmp_path):
    model = neurons(mlp, neurons(mlp))
    assert model[0].out_features == 16
    assert_loads(model, mlp, tmp_path / "twice")
    assert_loads(compress(model, "lowrank", density=0.4).model, mlp, tmp_path / "factorized")
    prune_network(model, "magnitude", keep=0.3)
    assert_loads(model, mlp, tmp_path / "masked")


def test_a_part_of_a_larger_network_may_be_narrowed(tmp_path):
    def build():
        return nn.Sequential(made(mlp), nn.Linear(4, 4))

    model = build().eval()
    model[0] = neurons(mlp, model[0])
    save_network(model, tmp_path / "pruned")
    x = inputs(mlp)
    loaded = load_network(build(), tmp_path / "pruned").eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_frozen(tmp_path):
    save_network(neurons(mlp), tmp_path / "pruned")
    full = made(mlp)
    full[0].requires_grad_(False)
    loaded = load_network(full, tmp_path / "pruned")
    assert [p.requires_grad for p in loaded[0].parameters()] == [False, False]
    assert all(p.requires_grad for p in loaded[3].parameters())


def test_no_other_network_is_ever_resized(tmp_path):
    narrow = made(lambda: mlp(32))
    save_network(narrow, tmp_path / "narrow")  # built like this, not pruned
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(32, 16\) there and \(64, 16\)"):
        load_network(made(mlp), tmp_path / "narrow")
    save_network(neurons(mlp), tmp_path / "pruned")
    wider = made(lambda: mlp(80))
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(32, 16\) there and \(80, 16\)"):
        load_network(wider, tmp_path / "pruned")
    other = made(mlp)
    other.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"lacks 6\.weight"):
        load_network(other, tmp_path / "pruned")
    assert other[0].weight.shape == (64, 16)
    assert str(other[:6]) == str(made(mlp))
    assert not hasattr(other, "_narrowed")
    after = made(lambda: mlp(80)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "record",
    [
        [1],
        {"0.weight": 3},
        {"0.weight": [[1], [2]]},
        {"0.weight": [[2, 2], [1]]},
        {"0.values": [[2], [1]]},
    ],
)
def test_records_of_narrowed_tensors_that_lie_are_refused(record, tmp_path):
    save_network(made(mlp), tmp_path / "lying", settings={"narrowed": record})
    with pytest.raises(ValueError, match="how tensors were narrowed"):
        load_network(made(mlp), tmp_path / "lying")
