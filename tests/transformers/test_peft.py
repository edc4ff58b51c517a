"""LoRA of `peft` on compressed networks: same outputs when merged, supports untouched."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    ButterflyLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    add_adapters,
    compress,
    merge_adapters,
)
from matfact.torch.layers._factors import FactorModule  # noqa: E402
from matfact.torch.layers.linear import FactorizedLinear  # noqa: E402
from matfact.transformers import lora_config  # noqa: E402
from tests.transformers.networks import NAMES, compressed, dense, inputs, logits  # noqa: E402

LAYERS = {
    "sparse": lambda: SparseProductLinear(16, 32, density=0.25, random_state=0),
    "monarch": lambda: MonarchLinear(16, 32, random_state=0),
    "butterfly": lambda: ButterflyLinear(16, 16, random_state=0),
    "blocks": lambda: BlockLowRankLinear(16, 32, rank=2, random_state=0),
    "low rank": lambda: LowRankLinear(16, 32, rank=3, random_state=0),
}


class Net(nn.Module):
    """A factorized layer before a dense one."""

    def __init__(self, layer):
        super().__init__()
        self.first = layer
        self.last = nn.Linear(layer.out_features, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def net(kind="sparse"):
    torch.manual_seed(0)
    return Net(LAYERS[kind]()).eval()


def coded_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return compress(model, "magnitude", density=0.5, value_bits=4).model.eval()


def adapted(model, targets="all-linear", seed=1, **settings):
    """Return `model` with an adapter that changes its outputs."""
    config = lora_config(model, LoraConfig(r=3, target_modules=targets, **settings))
    model = get_peft_model(model, config)
    draw(model, seed)
    return model.eval()


def draw(model, seed, name="default"):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "lora_" in own and f".{name}." in own:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


def samples(width=16):
    return torch.randn(8, width, generator=torch.Generator().manual_seed(3))


def supports(model):
    return [
        torch.as_tensor(m.to_factor().locations) for m in model.modules()
        if isinstance(m, FactorModule) and m.trained
    ]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_merging_changes_no_output_and_no_support(kind):
    model, x = net(kind), samples()
    before, places = model(x), supports(model)
    model = adapted(model)
    expected = model(x)
    assert (expected - before).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert type(merged.first) is type(LAYERS[kind]())
    torch.testing.assert_close(merged(x), expected)
    assert all(map(torch.equal, supports(merged), places))


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_values_are_those_of_merge_adapters(kind):
    model, other = adapted(net(kind), "first"), net(kind)
    pair = iter(add_adapters(other, rank=3))
    layer, row, column = model.base_model.model.first, 0, 0
    with torch.no_grad():
        for factor in other.first.factors:
            if factor.trained:
                rank = min(3, factor.rows, factor.columns)
                assert rank == 3  # of all factors, so that both have the same updates
                left = layer.lora_B["default"].weight[row : row + factor.rows]
                next(pair).copy_(left * layer.scaling["default"])
                right = layer.lora_A["default"].weight[:, column : column + factor.columns]
                next(pair).copy_(right)
                row, column = row + factor.rows, column + factor.columns
    merged, expected = model.merge_and_unload(), merge_adapters(other)
    states = merged.state_dict(), expected.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_unmerging_restores_values_to_the_bit():
    model = net()
    before = copy.deepcopy(model.first.state_dict())
    model = adapted(model, "first")
    model.merge_adapter()
    assert not torch.equal(model.base_model.model.first.base_layer.factors[0].values,
                           before["factors.0.values"])  # fmt: skip
    model.unmerge_adapter()
    after = model.base_model.model.first.base_layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_disabled_adapters_change_nothing():
    model, x = net(), samples()
    before = model(x)
    model = adapted(model, "first")
    for is_merged in (False, True):
        if is_merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), before)


def test_training_moves_adapters_only():
    model, x = net(), samples()
    config = lora_config(model, LoraConfig(r=3, target_modules="all-linear"))
    model = get_peft_model(model, config)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = (model.train()(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}


@torch.no_grad()
def test_adapters_are_saved_and_loaded(tmp_path):
    model, x = adapted(net()), samples()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported"):  # peft alone never guesses
        PeftModel.from_pretrained(net(), tmp_path)
    base = net()
    config = lora_config(base, LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config)
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_several_adapters():
    model, x = adapted(net(), "first"), samples()
    alone = model(x)
    model.add_adapter("second", lora_config(model, LoraConfig(r=2, target_modules="all-linear")))
    assert torch.equal(model(x), alone)
    draw(model, 2, "second")
    model.set_adapter("second")
    other = model(x)
    assert (other - alone).abs().max() > 0.1
    assert hasattr(model.base_model.model.last, "lora_A")  # with the dense layer too
    model.set_adapter("default")
    assert torch.equal(model(x), alone)
    model.add_adapter("third", lora_config(model, LoraConfig(r=4, target_modules="first")))
    draw(model, 5, "third")
    model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    both = model(x)
    model.base_model.set_adapter(["default", "third"])
    torch.testing.assert_close(model(x), both)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), both)


def test_dropout_is_of_the_adapter_only():
    model, x = net(), samples()
    with torch.no_grad():
        before = model(x)
        model = adapted(model, "first", lora_dropout=0.5)
        quiet = model(x)
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(x), quiet, atol=1e-3)
        for parameter in model.base_model.model.first.lora_B.parameters():
            parameter.zero_()
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_adapters_of_half_precision(dtype):
    model = net().to(dtype)
    model, x = adapted(model), samples().to(dtype)
    expected = model(x)
    assert expected.dtype == dtype
    merged = model.merge_and_unload()
    assert merged.first.factors[0].values.dtype == dtype
    torch.testing.assert_close(merged(x), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_codes_get_an_adapter_beside_them_that_is_not_merged():
    model, x = coded_net(), samples()
    before = model(x)
    model = adapted(model)
    adapted_outputs = model(x)
    assert (adapted_outputs - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="codes of few bits"):
        model.merge_and_unload()
    assert torch.equal(model(x), adapted_outputs)
    assert torch.equal(model.unload()(x), before)


def test_loading_other_supports_moves_the_adapters():
    model = adapted(net(), "first")
    other = Net(SparseProductLinear(16, 32, density=0.25, random_state=1))
    target = adapted(other, "first", seed=9)
    target.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(target(samples()), model(samples()))


def test_networks_with_adapters_are_copied_and_pickled():
    model, x = adapted(net()), samples()
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("settings", [
    {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True},
])  # fmt: skip
def test_variants_that_need_a_dense_weight_are_refused(settings):
    model = net()
    with pytest.raises(ValueError, match=f"config.{next(iter(settings))} must be"):
        lora_config(model, LoraConfig(target_modules="all-linear", **settings))
    assert type(model.first) is SparseProductLinear


def test_adapters_move_with_their_network():
    model, x = adapted(net()), samples()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.double()(x.double()).float(), expected)


def test_networks_with_other_adapters_are_refused():
    model = net()
    add_adapters(model, rank=1)
    with pytest.raises(ValueError, match="merge them first"):
        lora_config(model, LoraConfig(target_modules="all-linear"))


def test_one_batch_has_one_set_of_adapters():
    model = adapted(net(), "first")
    with pytest.raises(ValueError, match="adapter_names"):
        model(samples(), adapter_names=["default"] * 8)


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_means_what_it_means_in_the_dense_network(name):
    model = compressed(name)
    layers = {n for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert layers
    sets = [
        {n for n, m in given.named_modules() if hasattr(m, "lora_A")}
        for given in (
            get_peft_model(dense(name), LoraConfig(target_modules="all-linear")),
            get_peft_model(
                model, lora_config(model, LoraConfig(target_modules="all-linear"))
            ),
        )
    ]  # fmt: skip
    assert sets[0] == sets[1]


@pytest.mark.parametrize("name", NAMES)
def test_whole_networks_are_tuned_and_merged(name):
    model, batch = compressed(name, coded=False), inputs(name)
    model = adapted(model)
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    largest = expected.abs().max()
    assert (logits(merged, batch) - expected).abs().max() < 1e-4 * largest
