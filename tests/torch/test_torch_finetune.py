"""Training on fixed supports: what is gained, what stays."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import (  # noqa: E402
    SparseProductLinear,
    balance_factors,
    compress,
    compress_gradually,
    cubic_densities,
    fine_tune,
    merge_update,
    soft_cross_entropy,
)


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


def test_training_stops_when_scores_no_longer_rise_and_keeps_the_best(mlp, digits):
    small, _ = compress(mlp, "magnitude", density=0.3)
    states, scores = [], iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def validate(model):
        states.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    calls = []
    result = fine_tune(
        small, digits.batches[:1], loss, epochs=5, patience=2, validate=validate,
        progress=lambda *facts: calls.append(facts),
    )  # fmt: skip
    assert (result.best_epoch, result.scores) == (2, [0.1, 0.5, 0.4, 0.3])
    assert all(torch.equal(v, states[1][k]) for k, v in small.state_dict().items())
    assert [(epoch, score) for epoch, _, score in calls] == list(enumerate(result.scores, 1))


def test_a_teacher_alone_is_enough(mlp, digits):
    small, _ = compress(mlp, "magnitude", density=0.3)
    result = fine_tune(small, digits.batches, teacher=mlp, epochs=4)
    assert result.losses[-1] < result.losses[0]
    with pytest.raises(ValueError, match="loss"):
        fine_tune(small, digits.batches)
    with pytest.raises(ValueError, match="distillation"):
        fine_tune(small, digits.batches, loss, distillation=2.0)


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


def test_densities_fall_to_the_last_one():
    densities = cubic_densities(0.1, 6, initial=0.8)
    assert densities == sorted(densities, reverse=True)
    assert (densities[-1], densities[0] < 0.8) == (0.1, True)
    np.testing.assert_allclose(cubic_densities(0.1, 2), [0.1 + 0.9 / 8, 0.1])
    with pytest.raises(ValueError, match="n_stages"):
        cubic_densities(0.1, 0)


@pytest.mark.parametrize("method", ["magnitude", "dsf"])
def test_gradual_compression_trains_at_every_density(mlp, digits, method):
    seen = []

    def train(model, stage):
        torch.manual_seed(stage)
        seen.append(model[1].to_product().density)
        fine_tune(model, digits.batches, loss, epochs=2)

    small, report = compress_gradually(
        mlp, method, density=0.1, n_stages=3, train=train, keep_last=True
    )
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == report[0].density <= 0.1
    assert digits.accuracy(small) > 0.85
    assert isinstance(mlp[1], nn.Linear)
