"""Pruning where something is unusual: values, losses, layers, names, batches."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from matfact.torch.pruning import (  # noqa: E402
    GradualMagnitude,
    count_flops,
    make_permanent,
    prune_network,
    pruning_scores,
    to_torch_prune,
)


def layers(**kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, **kind), nn.Tanh(), nn.Linear(8, 4, **kind))


def squares(output, batch):
    return output.abs().square().mean()


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_loss_that_is_no_number_is_refused_with_its_batch(method):
    model, x = layers(), torch.randn(5, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"loss must be one finite number .* nan for batch 1"):
        prune_network(model, method, 0.3, [x, x * torch.nan], loss=squares)
    assert list(model.state_dict()) == list(before)
    with pytest.raises(ValueError, match=r"loss must be one .* shape \(5, 4\) for batch 0"):
        prune_network(model, method, 0.3, [x], loss=lambda output, batch: output)


@pytest.mark.parametrize("method", ["magnitude", "synflow"])
def test_scores_that_are_no_numbers_are_refused_with_their_parameter(method):
    model = layers()
    model[2].weight.data[1, 1] = torch.nan
    for act in (prune_network, pruning_scores):
        with pytest.raises(ValueError, match=r"scores .* must be finite, but those of \d.weight"):
            act(model, method, batches=[torch.ones(1, 6)])
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_gradual_pruning_ends_where_training_diverges():
    model = layers()
    pruner = GradualMagnitude(model, 0.5, steps=2, every=1)
    pruner.step()
    model[2].weight_orig.data[0, 0] = torch.nan
    kept = model[0].weight_mask.clone()
    with pytest.raises(ValueError, match=r"2\.weight"):
        pruner.step()
    assert torch.equal(model[0].weight_mask, kept)


def test_a_failure_in_a_later_round_leaves_all_weights():
    model, calls = layers(), []
    before = copy.deepcopy(model.state_dict())

    def exploding(output, batch):
        calls.append(1)
        return squares(output, batch) * (torch.inf if len(calls) > 2 else 1.0)

    with pytest.raises(ValueError, match="inf for batch 0"):
        prune_network(model, "snip", 0.3, [torch.randn(5, 6)], loss=exploding, rounds=5)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Centered(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Scaled(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_are_left_out_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), Centered(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)))
    model.append(Scaled(2, 2, 3)).append(nn.ConvTranspose2d(2, 2, 3))
    report = prune_network(model, "magnitude", 0.5)
    assert list(report.kept) == ["0.weight", "4.weight"]
    assert list(report.left_out) == ["1", "2", "3"]
    assert "custom forward" in report.left_out["1"]
    assert "computed from" in report.left_out["2"]
    asked = prune_network(model[:2], "magnitude", 0.4, prunable=lambda m, name: name == "weight")
    assert list(asked.kept) == ["0.weight", "1.weight"]
    assert not asked.left_out


def test_work_of_layers_with_a_forward_of_their_own_is_counted():
    model = nn.Sequential(nn.Linear(4, 4), Centered(4, 3))
    assert count_flops(model, torch.ones(5, 4)).total == 2 * 5 * (16 + 12)


@pytest.mark.parametrize("method", ["random", "magnitude", "snip", "grasp"])
def test_complex_weights_are_pruned(method):
    model, x = layers(dtype=torch.complex128), torch.randn(5, 6, dtype=torch.complex128)
    report = prune_network(model, method, 0.5, [x], loss=squares, random_state=0)
    assert report.share == 0.5
    assert int(make_permanent(model)[0].weight.count_nonzero()) == report.kept["0.weight"]


def test_scores_of_complex_weights_are_derivatives():
    model, x = layers(dtype=torch.complex128), torch.randn(5, 6, dtype=torch.complex128)
    scores = pruning_scores(model, "snip", [x], loss=squares)["0.weight"]
    weight, step = model[0].weight_orig, 1e-6
    with torch.no_grad():
        losses = []
        for factor in (1 + step, 1 - step):
            value = weight[0, 0].clone()
            weight[0, 0] *= factor
            losses.append(float(squares(model(x), x)))
            weight[0, 0] = value
    assert float(scores[0, 0]) == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_complex_weights_have_no_synaptic_flow():
    with pytest.raises(ValueError, match=r"'synflow' .* 0\.weight"):
        prune_network(layers(dtype=torch.complex64), "synflow", 0.5, [torch.ones(1, 6)])


def test_weights_of_eight_bits_are_left_out_and_refused_where_asked_for():
    model = layers()
    small = model[2].weight.detach().to(torch.float8_e4m3fn)
    model[2].weight = nn.Parameter(small, requires_grad=False)
    with pytest.raises(ValueError, match=r"2\.weight is of torch\.float8_e4m3fn"):
        prune_network(model, "magnitude", 0.5, prunable=lambda module, name: name == "weight")
    report = prune_network(model, "magnitude", 0.5)
    assert list(report.kept) == ["0.weight"]
    assert "float8" in report.left_out["2"]


def test_weights_that_are_not_in_memory_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
        prune_network(model, "magnitude", 0.5)
    assert "0.weight" in model.state_dict()


class Tied(nn.Module):
    """A language model of one matrix, read in two ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_weights_share_the_mask_and_stay_tied():
    model, x = Tied(), torch.arange(20)
    report = prune_network(model, "magnitude", 0.3)
    assert report.kept == {"head.weight": 48}
    for each in (model, copy.deepcopy(model)):
        optimizer = torch.optim.SGD(each.parameters(), 1.0)
        squares(each(x), x).backward()
        optimizer.step()
        assert torch.equal(each.embed.weight, each.head.weight)
        assert int(each.embed.weight.count_nonzero()) == 48
    make_permanent(model)
    assert model.embed.weight is model.head.weight
    assert type(model.embed) is nn.Embedding


def test_tied_layers_count_all_their_work():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    assert count_flops(model, torch.ones(3, 5)).stored == {"0.weight": 2 * 3 * 25 * 2}


def test_tied_weights_become_masks_of_torch_in_all_layers():
    model, x = Tied(), torch.arange(20)
    prune_network(model, "magnitude", 0.3)
    expected = model(x)
    to_torch_prune(model)
    torch.testing.assert_close(model(x), expected)
    names = {"embed.weight_orig", "embed.weight_mask", "head.weight_orig", "head.weight_mask"}
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("method", ["magnitude", "snip", "synflow"])
def test_layers_without_weights_have_not_collapsed(method):
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 3))
    batches = [torch.ones(2, 4)]
    report = prune_network(copy.deepcopy(model), method, 0.5, batches, loss=squares)
    assert report.kept == {"2.weight": 4}
    assert report.left_out == dict.fromkeys(("0", "1"), "weight without entries")
    chosen = {"loss": squares, "prunable": lambda module, name: name == "weight"}
    report = prune_network(model, method, 0.5, batches, **chosen)
    assert report.kept == {"0.weight": 0, "1.weight": 0, "2.weight": 4}
    assert not report.collapsed
    assert count_flops(model, torch.ones(2, 4)).stored["0.weight"] == 0


def test_everything_and_nothing_can_be_kept():
    x = torch.ones(1, 6)
    whole, nothing = layers(), layers()
    assert prune_network(whole, "synflow", 1.0, [x]).share == 1.0
    torch.testing.assert_close(whole(x), layers()(x))
    with pytest.warns(UserWarning, match=r"All weights of 0\.weight, 2\.weight"):
        assert prune_network(nothing, "synflow", 1e-9, [x]).share == 0.0


def test_parameters_keep_their_flags_and_their_order():
    model = layers()
    model[0].weight.requires_grad_(False)
    names, flags = zip(*((n, p.requires_grad) for n, p in model.named_parameters()), strict=True)
    prune_network(model, "snip", 0.5, [torch.randn(5, 6)], loss=squares)
    assert tuple(p.requires_grad for p in model.parameters()) == flags
    make_permanent(model)
    assert tuple(name for name, _ in model.named_parameters()) == names
    assert tuple(p.requires_grad for p in model.parameters()) == flags


def test_pruned_values_are_zero_whatever_they_were():
    model = layers()
    prune_network(model, "random", 0.5, random_state=0)
    with torch.no_grad():
        model[0].weight_orig[~model[0].weight_mask] = torch.inf
    make_permanent(model)
    assert bool(torch.isfinite(model[0].weight).all())


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_batches_come_from_loaders_but_not_from_generators(method):
    x, y = torch.randn(12, 6), torch.zeros(12, dtype=torch.long)

    def loss(output, batch):
        return functional.cross_entropy(output, batch[1])

    loader, model = DataLoader(TensorDataset(x, y), 4), layers()
    assert prune_network(model, method, 0.5, loader, loss=loss).share == 0.5
    with pytest.raises(ValueError, match=r"batches must .* more than once"):
        prune_network(layers(), method, 0.5, iter([(x, y)]), loss=loss)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_random_numbers_of_the_network_are_the_same_every_time(method):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layers()

        def forward(self, x):
            return self.net(functional.dropout(x, 0.5, training=True))

    torch.manual_seed(1)
    model, batches = Dropping(), [torch.randn(6, 6) for _ in range(2)]
    first, second = (
        pruning_scores(copy.deepcopy(model), method, batches, loss=squares) for _ in range(2)
    )
    for label, score in first.items():
        torch.testing.assert_close(second[label], score, atol=0.0, rtol=0.0)
