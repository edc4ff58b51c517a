"""Pruning scores against derivatives, masks on any layer, collapse, and counted work."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune as torch_prune  # noqa: E402

from matfact.torch import (  # noqa: E402
    ButterflyLinear,
    FactorizedConv,
    LowRankLinear,
    SparseProductLinear,
)
from matfact.torch.pruning import (  # noqa: E402
    GradualMagnitude,
    LayerCollapseWarning,
    count_flops,
    make_permanent,
    prunable_parameters,
    prune_network,
    pruning_scores,
    to_torch_prune,
)

METHODS = ["random", "magnitude", "snip", "grasp", "synflow"]


def cross_entropy(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def tiny():
    """Return a smooth network in double precision with a batch, for finite differences."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    return model, [(torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))]


def relu_network(widths, seed=0, bias=True):
    torch.manual_seed(seed)
    layers = [[nn.Linear(a, b, bias=bias), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*list(itertools.chain(*layers))[:-1])


def loss_gradient(model, batch, temperature=1.0):
    model.train()
    weights = [model[0].weight, model[3].weight]
    loss = cross_entropy(model(batch[0]) / temperature, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def flat_weights(model):
    return torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]).detach()


def moved(model, step):
    """Return a copy of the tiny network whose weights have moved by a flat `step`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, part in zip((0, 3), step.split([12, 12]), strict=True):
            model[i].weight += part.reshape(model[i].weight.shape)
    return model


def flat_scores(model, method, batches):
    scores = pruning_scores(copy.deepcopy(model), method, batches, loss=cross_entropy)
    return torch.cat([score.flatten() for score in scores.values()])


def test_snip_agrees_with_finite_differences():
    model, batches = tiny()
    weights, step = flat_weights(model), 1e-6
    losses = []
    for unit in torch.eye(24, dtype=torch.float64) * step:
        both = [cross_entropy(moved(model, s)(batches[0][0]), batches[0]) for s in (unit, -unit)]
        losses.append((both[0] - both[1]).item() / (2 * step))
    expected = (torch.tensor(losses, dtype=torch.float64) * weights).abs()
    torch.testing.assert_close(flat_scores(model, "snip", batches), expected, atol=1e-8, rtol=1e-5)


def test_grasp_agrees_with_finite_differences():
    model, batches = tiny()
    gradient, step = loss_gradient(model, batches[0], 200.0), 0.01
    both = [loss_gradient(moved(model, s * gradient), batches[0], 200.0) for s in (step, -step)]
    expected = (both[0] - both[1]) / (2 * step) * flat_weights(model)
    found = flat_scores(model, "grasp", batches)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_batches_add_up():
    model, [(x, y)] = tiny()
    del model[1]  # with batch normalization, the loss of a sample depends on its batch
    model.insert(1, nn.Identity())

    def summed(output, batch):
        return nn.functional.cross_entropy(output, batch[1], reduction="sum")

    for method in ("snip", "grasp"):
        whole = pruning_scores(model, method, [(x, y)], loss=summed)
        parts = pruning_scores(model, method, [(x[:2], y[:2]), (x[2:], y[2:])], loss=summed)
        for label, score in whole.items():
            torch.testing.assert_close(parts[label], score)


def test_synflow_agrees_with_a_computation_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.GELU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[3].weight.copy_(torch.tensor([[-5.0, 6.0]]))
        model[1].running_mean.copy_(torch.tensor([7.0, -8.0]))  # must not matter
        model[1].running_var.copy_(torch.tensor([9.0, 10.0]))
    scores = pruning_scores(model, "synflow", [torch.randn(3, 2)])
    # R = 5·(1 + 2) + 6·(3 + 4)
    first = torch.tensor([[5.0, 10.0], [18.0, 24.0]], dtype=torch.float64)
    torch.testing.assert_close(scores["0.weight"], first)
    torch.testing.assert_close(scores["3.weight"], torch.tensor([[15.0, 42.0]]).double())


def test_synflow_survives_deep_networks_of_small_weights():
    model = relu_network([16] * 41)
    for p in model.parameters():
        p.data *= 0.01
    scores = pruning_scores(model, "synflow", [torch.ones(1, 16)])
    totals = torch.stack([score.sum() for score in scores.values()])
    assert totals[0] > 0
    torch.testing.assert_close(totals, totals[:1].expand(40))  # flow is conserved


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [[20, 30, 10, 5], [8, 64, 64, 2], [10, 3, 50, 50, 4]])
def test_synflow_collapses_no_layer_before_the_theoretical_limit(widths, seed):
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    # A single path is the least with which anything flows, whatever the number of rounds.
    for kept in (len(sizes), 2 * len(sizes)):
        for rounds in (1, 100):
            model = relu_network(widths, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                report = prune_network(
                    model, "synflow", (kept + 0.5) / sum(sizes), [torch.ones(1, widths[0])],
                    rounds=rounds,
                )  # fmt: skip
            assert sum(report.kept.values()) == kept
            assert min(report.kept.values()) >= 1
            positive = copy.deepcopy(make_permanent(model))
            for p in positive.parameters():
                p.data = p.data.abs() if p.ndim == 2 else torch.zeros_like(p)
            assert positive(torch.ones(1, widths[0])).sum().item() > 0  # the path is connected


class Residual(nn.Module):
    """Two convolutions that the flow has a way around."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))


@pytest.mark.parametrize("extra", [0, 15])
def test_synflow_collapses_no_layer_of_residual_networks(extra):
    torch.manual_seed(0)
    blocks = Residual(6), nn.MaxPool2d(2), Residual(6), Residual(6), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(1, 6, 3), *blocks, nn.Linear(54, 4))
    sizes = [p.values.numel() for p in prunable_parameters(model)]
    kept = len(sizes) + extra
    batch = torch.ones(1, 1, 8, 8)
    report = prune_network(model, "synflow", (kept + 0.5) / sum(sizes), [batch], rounds=20)
    assert sum(report.kept.values()) == kept
    assert not report.collapsed
    scores = pruning_scores(model, "synflow", [batch])
    assert max(scores["0.weight"][model[0].weight_mask]) > 0  # something still flows


def test_magnitude_collapses_a_layer_of_small_weights_with_a_warning():
    model = relu_network([10, 10, 10])
    model[0].weight.data *= 1e-3
    with pytest.warns(LayerCollapseWarning, match=r"0\.weight"):
        report = prune_network(model, "magnitude", 0.3)
    assert report.collapsed == ["0.weight"]
    assert report.kept == {"0.weight": 0, "2.weight": 60}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_the_share_asked_for_is_kept(cnn, digits, method, scope):
    before = copy.deepcopy(cnn.state_dict())
    flags = [module.training for module in cnn.modules()]
    report = prune_network(
        cnn, method, 0.3, digits.batches[:1], loss=cross_entropy, scope=scope,
        rounds=10 if method == "synflow" else None, random_state=0,
    )  # fmt: skip
    total = sum(report.sizes.values())
    assert 0.3 * total - (1 if scope == "global" else 3) < sum(report.kept.values()) <= 0.3 * total
    if scope == "layer":
        assert all(report.kept[k] == math.floor(0.3 * n) for k, n in report.sizes.items())
    for parameter in prunable_parameters(cnn):
        assert int(parameter.values.count_nonzero()) == report.kept[parameter.label]
    # Nothing else has changed: neither modes nor running statistics nor what is kept.
    assert [module.training for module in make_permanent(cnn).modules()] == flags
    after = cnn.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], v) for k, v in before.items() if k not in report.kept)
    assert all(torch.equal(after[k], before[k] * (after[k] != 0)) for k in report.kept)


@pytest.mark.parametrize("method", ["snip", "grasp", "magnitude", "synflow"])
def test_what_is_pruned_stays_pruned(mlp, digits, method):
    options = {"batches": digits.batches[:1], "loss": cross_entropy, "rounds": 3}
    prune_network(mlp, method, 0.5, **options)
    pruned = [~p.mask.clone() for p in prunable_parameters(mlp)]
    prune_network(mlp, method, 0.2, **options)
    for p, before in zip(prunable_parameters(mlp), pruned, strict=True):
        assert not (p.mask & before).any()


def test_training_moves_no_mask(mlp, digits):
    before = list(mlp.parameters())
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=1e-2, weight_decay=0.1)
    report = prune_network(mlp, "magnitude", 0.1)
    assert {id(p) for p in mlp.parameters()} == {id(p) for p in before}
    low = digits.accuracy(mlp)
    mlp.train()
    for batch in digits.batches * 3:
        optimizer.zero_grad()
        cross_entropy(mlp(batch[0]), batch).backward()
        optimizer.step()
    assert digits.accuracy(mlp) > max(low, 0.9)
    kept = {p.label: int(p.values.count_nonzero()) for p in prunable_parameters(mlp)}
    assert kept == report.kept


def test_masks_turn_into_those_of_torch(mlp, digits):
    prune_network(mlp, "magnitude", 0.1)
    x = digits.batches[0][0]
    expected = mlp(x)
    assert not torch_prune.is_pruned(mlp)
    to_torch_prune(mlp)
    assert torch_prune.is_pruned(mlp)
    assert {"1.weight_orig", "1.weight_mask"} <= set(mlp.state_dict())
    torch.testing.assert_close(mlp(x), expected)
    for i in (1, 3, 5):
        torch_prune.remove(mlp[i], "weight")
    torch.testing.assert_close(mlp(x), expected)


def test_masks_of_torch_are_taken_over(mlp, digits):
    torch_prune.random_unstructured(mlp[1], "weight", 0.5)
    before = mlp[1].weight_mask.bool().clone()
    report = prune_network(mlp, "synflow", 0.2, digits.batches[:1], rounds=5)
    assert not torch_prune.is_pruned(mlp)
    assert not (mlp[1].weight_mask.bool() & ~before).any()
    assert int(make_permanent(mlp)[1].weight.count_nonzero()) == report.kept["1.weight"]


def test_pruned_networks_are_copied_and_pickled(mlp, digits, tmp_path):
    prune_network(mlp, "magnitude", 0.1)
    torch.save(mlp, tmp_path / "mlp.pt")
    x = digits.batches[0][0]
    loaded = torch.load(tmp_path / "mlp.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(mlp)):
        torch.testing.assert_close(other(x), mlp(x))
        assert list(other.state_dict()) == list(mlp.state_dict())
        make_permanent(other)
        assert type(other[1]) is nn.Linear
        assert type(mlp[1]) is not nn.Linear


def test_masks_are_saved_and_loaded(mlp, digits):
    fresh = copy.deepcopy(mlp)
    prune_network(mlp, "random", 0.2, random_state=0)
    prune_network(fresh, "random", 0.2, random_state=1)
    fresh.load_state_dict(mlp.state_dict())
    x = digits.batches[0][0]
    torch.testing.assert_close(fresh(x), mlp(x))


def test_random_scores_follow_the_seed():
    masks = []
    for seed in (0, 0, 1):
        model = relu_network([10, 10])
        prune_network(model, "random", 0.5, random_state=seed)
        masks.append(next(iter(prunable_parameters(model))).mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def factorized_network():
    conv = FactorizedConv.from_scratch(
        nn.Conv2d(1, 8, 3, padding=1), SparseProductLinear, density=0.5, random_state=0
    )
    heads = ButterflyLinear(512, 16, random_state=0), LowRankLinear(16, 10, rank=4, random_state=0)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), heads[0], nn.ReLU(), heads[1])


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_pruned_and_trained_as_weights_are(digits, method):
    model = factorized_network()
    options = {"loss": cross_entropy, "rounds": 5, "random_state": 0}
    report = prune_network(model, method, 0.5, digits.batches[:1], **options)
    assert any(label.startswith("0.kernels") for label in report.kept)
    assert 0.49 < report.share <= 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for batch in digits.batches:
        optimizer.zero_grad()
        losses.append(cross_entropy(model.train()(batch[0]), batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    x = digits.batches[0][0]
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)  # with kept products
        prune_network(model, "magnitude", 0.2, scope="layer")
        pruned = model(x)
    assert not torch.allclose(pruned, expected, atol=1e-3)
    torch.testing.assert_close(make_permanent(model)(x), pruned, atol=1e-5, rtol=1e-4)
    assert {p.label: int(p.values.count_nonzero()) for p in prunable_parameters(model)}


def test_synflow_keeps_a_path_through_factorized_layers():
    model = nn.Sequential(
        ButterflyLinear(16, 16, random_state=0), nn.ReLU(), LowRankLinear(16, 4, rank=2)
    )
    n = len(prunable_parameters(model))
    size = sum(p.values.numel() for p in prunable_parameters(model))
    report = prune_network(model, "synflow", (n + 0.5) / size, [torch.ones(1, 16)])
    assert list(report.kept.values()) == [1] * n
    assert not report.collapsed


def test_attention_is_pruned_where_a_predicate_names_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = prune_network(
        layer, "magnitude", 0.25, scope="layer", prunable=lambda module, name: "weight" in name and
        not isinstance(module, nn.LayerNorm),
    )  # fmt: skip
    assert set(report.kept) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    x = torch.randn(2, 5, 8)
    masked = layer.eval()(x)
    torch.testing.assert_close(make_permanent(layer)(x), masked)
    assert type(layer.linear1) is nn.Linear


@pytest.mark.filterwarnings("ignore::matfact.torch.pruning.LayerCollapseWarning")
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_pruning_follows_the_cubic_schedule(scope):
    model = relu_network([20, 30, 10])
    first = nn.Linear(20, 30).weight
    pruner = GradualMagnitude(model, 0.1, steps=10, every=5, start=2, scope=scope)
    shares = []
    for _ in range(15):
        pruner.step()
        kept = sum(int(p.mask.sum()) for p in prunable_parameters(model))
        shares.append(kept / 900)
        first = model[0].weight
    assert int(first.count_nonzero()) == 60 or scope == "global"
    half = 0.1 + 0.9 * 0.5**3
    np.testing.assert_allclose(shares, [1] * 7 + [half] * 5 + [0.1] * 3, atol=2 / 900)


def test_flops_are_counted_by_what_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
            self.dense = nn.Linear(4, 4)
            self.unused = nn.Linear(7, 7)

        def forward(self, x):
            x = self.conv(x).mean((2, 3))
            return self.dense(self.dense(x))

    model = Twice()
    count = count_flops(model, torch.ones(5, 2, 9, 9))
    positions = 4 * 4
    expected = {"conv.weight": 2 * 4 * 9 * positions * 5, "dense.weight": 2 * 16 * 2 * 5}
    assert count.stored == expected | {"unused.weight": 0} == count.kept
    assert count.sparsity == 0.0
    assert "unused.weight" not in count.layer_sparsity()
    prune_network(model, "magnitude", 0.25, scope="layer", prunable=lambda m, n: n == "weight")
    count = count_flops(model, torch.ones(5, 2, 9, 9))
    assert count.layer_sparsity() == {"conv.weight": 0.75, "dense.weight": 0.75}
    assert count.sparsity == 0.75


def test_flops_of_convolutions_agree_with_those_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, stride=2, groups=4))
    model.append(nn.ConvTranspose2d(8, 4, 3, stride=2)).append(nn.Conv1d(9, 2, 3))
    model.insert(3, nn.Flatten(2)).insert(4, nn.Linear(81, 9))
    model.insert(5, nn.Unflatten(1, (2, 2))).insert(6, nn.Flatten(1, 2))
    model[7] = nn.Conv1d(4, 2, 3)
    x = torch.ones(2, 3, 12, 12)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert count_flops(model, x).total == counter.get_total_flops()


def test_flops_of_factorized_layers_are_those_of_their_values():
    model = factorized_network()
    count = count_flops(model, torch.ones(3, 1, 8, 8))
    for parameter in prunable_parameters(model):
        positions = 64 if parameter.label.startswith("0.") else 1
        assert count.kept[parameter.label] == 2 * 3 * positions * parameter.values.numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method"),
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.1}, "keep"),
        ({"scope": "net"}, "scope"),
        ({"rounds": 0}, "rounds"),
        ({"method": "snip"}, "batches"),
        ({"method": "synflow"}, "batches"),
        ({"method": "grasp", "batches": [torch.ones(1, 4)]}, "loss"),
        ({"prunable": lambda module, name: False}, "prunable"),
    ],
)
def test_bad_arguments_of_pruning_are_refused(options, message):
    model = relu_network([4, 4])
    with pytest.raises(ValueError, match=message):
        prune_network(model, **{"method": "magnitude", **options})
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias"]


def test_bad_arguments_of_gradual_pruning_are_refused():
    for options in ({"keep": 2.0}, {"steps": 0}, {"every": 0}, {"start": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GradualMagnitude(relu_network([4, 4]), **{"keep": 0.5, "steps": 3, **options})
