"""Training on fixed supports: what is gained, what stays."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import (  # noqa: E402
    SparseProductLinear,
    add_adapters,
    balance_factors,
    compress,
    compress_gradually,
    cubic_densities,
    fine_tune,
    merge_adapters,
    merge_update,
    soft_cross_entropy,
)
from matfact.torch.layers._factors import FactorModule  # noqa: E402


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def supports(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("mask")]


@pytest.mark.parametrize("method", ["magnitude", "dsf"])
def test_fine_tuning_restores_accuracy_on_the_same_support(mlp, digits, method):
    small, _ = compress(mlp, method, density=0.15)
    before, masks = digits.accuracy(small), supports(small)
    result = fine_tune(
        small, digits.batches, loss, teacher=mlp, distance=soft_cross_entropy(), epochs=10,
        optimizer=torch.optim.Adam(small.parameters(), lr=1e-2), validate=digits.accuracy,
    )  # fmt: skip
    assert digits.accuracy(small) == max(result.scores) > before
    assert digits.accuracy(small) > 0.9
    assert all(map(torch.equal, supports(small), masks))


def positions(model):
    """Return where the factors of a network may be nonzero."""
    with torch.no_grad():
        return [m.dense() != 0 for m in model.modules() if isinstance(m, FactorModule)]


def contains(old, new):
    return not bool((new & ~old).any())


@pytest.mark.parametrize("method", ["magnitude", "dsf", "monarch", "blocksvd"])
@pytest.mark.parametrize("optimizer", ["momentum", "AdamW"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_no_optimizer_moves_a_support(request, digits, network, optimizer, method):
    dense = request.getfixturevalue(network)
    small, _ = compress(dense, method, density=0.45, keep=("first", "last"))
    before, values = positions(small), [p.detach().clone() for p in small.parameters()]
    if optimizer == "momentum":
        rule = torch.optim.SGD(small.parameters(), 0.02, momentum=0.9, weight_decay=0.01)
    else:
        rule = torch.optim.AdamW(small.parameters(), 1e-3, weight_decay=0.1)
    fine_tune(small, digits.batches[:4], loss, optimizer=rule, epochs=1)
    assert before
    assert all(map(contains, before, positions(small)))
    assert not any(map(torch.equal, values, small.parameters()))


def test_schedules_follow_the_steps(mlp, digits):
    rule = torch.optim.SGD(mlp.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(rule, 1.0, 0.0, 2 * len(digits.batches))
    fine_tune(mlp, digits.batches, loss, optimizer=rule, schedule=schedule, epochs=1)
    assert rule.param_groups[0]["lr"] == pytest.approx(0.05)


def test_training_stops_when_scores_no_longer_rise_and_keeps_the_best(mlp, digits):
    small, _ = compress(mlp, "magnitude", density=0.3)
    states, scores = [], iter([0.05, 0.1, 0.5, 0.4, 0.3, 0.9])

    def validate(model):
        states.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    calls = []
    result = fine_tune(
        small, digits.batches[:1], loss, epochs=5, patience=2, validate=validate,
        progress=lambda *facts: calls.append(facts),
    )  # fmt: skip
    assert (result.best_epoch, result.scores) == (2, [0.1, 0.5, 0.4, 0.3])
    assert result.first_score == 0.05
    assert all(torch.equal(v, states[2][k]) for k, v in small.state_dict().items())
    assert [(epoch, score) for epoch, _, score in calls] == list(enumerate(result.scores, 1))


def test_no_epoch_is_kept_that_is_worse_than_the_start(cnn, digits):
    """The start is restored bit by bit, the statistics of batch norms included."""
    before = copy.deepcopy(cnn.state_dict())
    rule = torch.optim.SGD(cnn.parameters(), 0.3)
    scores = iter([0.5, 0.4, float("nan"), 0.3])
    cnn[1].train()
    result = fine_tune(
        cnn, digits.batches[:2], loss, optimizer=rule, epochs=3, validate=lambda _: next(scores)
    )
    assert (result.best_epoch, result.first_score) == (0, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in cnn.state_dict().items())
    modes = [m.training for m in cnn.modules()]
    assert (sum(modes), cnn[1].training) == (1, True)


def test_any_score_is_better_than_nan(mlp, digits):
    def tune(scores):
        left = iter(scores)
        batches = digits.batches[:1]
        return fine_tune(mlp, batches, loss, epochs=2, validate=lambda _: next(left))

    nan = float("nan")
    assert tune([nan, nan, -1.0]).best_epoch == 2
    assert tune([nan, -1.0, nan]).best_epoch == 1
    with pytest.raises(ValueError, match="validate must return a number"):
        tune([nan, nan, nan])


@pytest.mark.parametrize("broken", ["loss", "step"])
def test_a_network_that_training_breaks_is_never_returned(broken, mlp, digits):
    def train(**options):
        rule = torch.optim.SGD(mlp.parameters(), lr=1e38 if broken == "step" else 0.1)

        def failing(output, batch):
            calls.append(1)
            factor = float("nan") if broken == "loss" and len(calls) == 3 else 1.0
            return factor * loss(output, batch)

        calls = []
        return fine_tune(mlp, digits.batches[:2], failing, optimizer=rule, epochs=2, **options)

    before, where = copy.deepcopy(mlp.state_dict()), r"batch \d of epoch \d|after epoch 1"
    with pytest.warns(UserWarning, match=where):
        result = train(validate=lambda _: float(len(list(mlp.parameters()))))
    assert result.best_epoch == 0
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())
    with pytest.raises(ValueError, match=where):
        train()


def test_an_interrupted_training_leaves_the_best_network(mlp, digits):
    before = copy.deepcopy(mlp.state_dict())

    def stop(epoch, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(mlp, digits.batches[:1], loss, validate=lambda _: 0.0, progress=stop)
    assert all(torch.equal(v, before[k]) for k, v in mlp.state_dict().items())


def test_gradual_compression_refuses_a_network_that_training_broke(mlp):
    def train(model, stage):
        torch.nn.init.constant_(next(model.parameters()), float("nan"))

    with pytest.raises(ValueError, match="after stage 0"):
        compress_gradually(mlp, "magnitude", density=0.5, n_stages=1, train=train)


def test_a_teacher_alone_is_enough(mlp, digits):
    small, _ = compress(mlp, "magnitude", density=0.3)
    result = fine_tune(small, digits.batches, teacher=mlp, epochs=4)
    assert result.losses[-1] < result.losses[0]
    with pytest.raises(ValueError, match="loss"):
        fine_tune(small, digits.batches)
    with pytest.raises(ValueError, match="distillation"):
        fine_tune(small, digits.batches, loss, distillation=2.0)
    with pytest.raises(ValueError, match="patience needs validate"):
        fine_tune(small, digits.batches, loss, patience=1)


def test_balanced_factors_have_nearly_equal_norms_and_the_same_outputs():
    layer = SparseProductLinear(16, 16, random_state=0)
    x = torch.randn(4, 16)
    with torch.no_grad():
        layer.factors[0].values.mul_(1024.0)
        expected = layer(x)
        balance_factors(layer)
        torch.testing.assert_close(layer(x), expected)
        norms = [float(factor.values.norm()) for factor in layer.chain]
    assert max(norms) < 2.1 * min(norms)


def test_a_merged_update_moves_the_product_and_not_the_support():
    torch.manual_seed(0)
    layer = SparseProductLinear(16, 16, density=0.5, random_state=0, dtype=torch.float64)
    masks, before = supports(layer), layer.weight.detach()
    update = 0.1 * torch.outer(*torch.randn(2, 16, dtype=torch.float64))
    merge_update(layer, update)
    left = torch.linalg.norm(before + update - layer.weight.detach())
    assert left < 0.8 * torch.linalg.norm(update)
    assert all(map(torch.equal, supports(layer), masks))


@pytest.mark.parametrize("method", ["magnitude", "dsf", "monarch", "lowrank"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_adapters_restore_accuracy_and_merge_without_loss(request, digits, network, method):
    dense = request.getfixturevalue(network)
    small, _ = compress(dense, method, density=0.2, keep=("first", "last"))
    before, accuracy = positions(small), digits.accuracy(small)
    kept = {name: p.detach().clone() for name, p in small.named_parameters()}
    adapters = add_adapters(small, 4, random_state=0)
    assert digits.accuracy(small) == accuracy
    result = fine_tune(
        small, digits.batches, loss, optimizer=torch.optim.AdamW(adapters, 1e-2), epochs=3
    )
    assert result.losses[-1] < result.losses[0]
    with torch.no_grad():
        expected = small.eval()(digits.test_x)
        assert merge_adapters(small) is small
        torch.testing.assert_close(small(digits.test_x), expected)
    assert {name for name, _ in small.named_parameters()} == set(kept)
    moved = {name for name, p in small.named_parameters() if not torch.equal(p, kept[name])}
    assert moved
    assert all(name.endswith("values") for name in moved)
    assert all(map(contains, before, positions(small)))


def test_what_was_frozen_before_adapters_is_frozen_after(mlp):
    mlp[3].weight.requires_grad_(False)
    mlp[5].bias.requires_grad_(False)
    mlp.append(nn.Linear(10, 10))
    mlp.append(nn.Linear(10, 10))
    mlp[7].weight = mlp[6].weight  # which both of them hold
    small, _ = compress(mlp, "magnitude", density=0.2, layers="[135]")
    before = {name: p.requires_grad for name, p in small.named_parameters()}
    assert not all(before.values())
    add_adapters(small, 2)
    merge_adapters(small)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == before


def test_adapters_are_refused_where_nothing_can_be_adapted(mlp):
    with pytest.raises(ValueError, match="compressed layers"):
        add_adapters(mlp, 2)
    assert all(parameter.requires_grad for parameter in mlp.parameters())
    small, _ = compress(mlp, "magnitude", density=0.2)
    with pytest.raises(ValueError, match="rank"):
        add_adapters(small, 0)
    add_adapters(small, 2)
    with pytest.raises(ValueError, match="merge"):
        add_adapters(small, 2)


def test_densities_fall_to_the_last_one():
    densities = cubic_densities(0.1, 6, initial=0.8)
    assert densities == sorted(densities, reverse=True)
    assert (densities[-1], densities[0] < 0.8) == (0.1, True)
    np.testing.assert_allclose(cubic_densities(0.1, 2), [0.1 + 0.9 / 8, 0.1])
    with pytest.raises(ValueError, match="n_stages"):
        cubic_densities(0.1, 0)


@pytest.mark.parametrize("method", ["magnitude", "dsf", "palm4msa"])
def test_gradual_compression_trains_at_every_density(mlp, digits, method):
    seen = []

    def train(model, stage):
        torch.manual_seed(stage)
        seen.append(model[1].to_product().density)
        fine_tune(model, digits.batches, loss, epochs=2)

    small, report = compress_gradually(
        mlp, method, density=0.1, n_stages=3, train=train, keep=("last",)
    )
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == report[0].density <= 0.1
    assert digits.accuracy(small) > 0.85
    assert isinstance(mlp[1], nn.Linear)
