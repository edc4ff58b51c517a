"""Compressed networks that learn to give the outputs of the dense one."""

import copy

import pytest

torch = pytest.importorskip("torch")

from matfact.torch import compress, distill, soft_cross_entropy  # noqa: E402
from tests.torch.test_matching import Network, batches, distance  # noqa: E402


def small(model, **options):
    return compress(model, "magnitude", density=0.4, layers="blocks", **options)


def test_fresh_outputs_come_closer_and_the_report_tells():
    dense = Network()
    model, report = small(dense)
    before = distance(model, dense)
    support = [factor.nnz for factor in model.blocks[0].up.to_product().factors]
    record = distill(model, dense, batches(40), learning_rate=0.01, report=report)
    assert distance(model, dense) < 0.8 * before
    assert record.scores[record.best_epoch - 1] > record.first_score
    assert report.metadata["steps"][-1].startswith("distilled in 32 steps (held-out error of")
    assert [factor.nnz for factor in model.blocks[0].up.to_product().factors] == support


def test_other_parameters_and_modes_stay_as_they_are():
    dense = Network()
    model, _ = small(dense)
    model.train()
    model.blocks[0].norm.weight.requires_grad_(False)
    kept = {name: p.clone() for name, p in model.named_parameters()
            if name in ("head.weight", "blocks.0.norm.weight")}  # fmt: skip
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    distill(model, dense, batches(10))
    state = dict(model.named_parameters())
    assert len(kept) == 2
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert {name: p.requires_grad for name, p in state.items()} == required
    assert all(p.grad is None for p in state.values())
    assert model.training
    assert not any(each._forward_hooks for each in model.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in dense.modules())


def test_a_rate_that_harms_leaves_the_network_as_it_was():
    dense = Network()
    model, _ = small(dense)
    before = copy.deepcopy(model.state_dict())
    record = distill(model, dense, batches(10), learning_rate=0.99)
    if record.best_epoch == 0:
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert max([record.first_score, *record.scores]) >= record.first_score
    assert -record.first_score >= _held_out(model, dense)


def _held_out(model, dense):
    x = torch.cat(batches(10)[1::5])
    with torch.no_grad():
        error, square = ((f(x) - g).square().sum(-1) for f, g in ((model, dense(x)), (dense, 0)))
    return float((error / (square + 0.01 * square.mean())).mean().sqrt())


def test_the_same_seed_gives_the_same_network():
    dense = Network()
    first, second = (small(dense)[0] for _ in range(2))
    for model in (first, second):
        distill(model, dense, batches(10), epochs=2)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_both_networks_draw_the_same_random_numbers():
    class Noisy(Network):
        def forward(self, x):
            return super().forward(x + 10 * torch.randn_like(x))

    dense = Noisy()
    model, _ = small(dense)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=False):
            assert ours is not theirs
    twin = copy.deepcopy(dense)
    record = distill(twin, dense, batches(5))
    assert record.first_score == 0.0  # no difference but the noise


def test_padding_does_not_count():
    class Masked(Network):
        def forward(self, x, attention_mask):
            return super().forward(x)

    dense = Masked()
    ends = []
    for noise in (0.0, 100.0):
        model, _ = small(dense)
        given = []
        for x in batches(10):
            mask = torch.ones(4, 8)
            mask[:, 5:] = 0
            x = x.clone()
            x[:, 5:] += noise
            given.append({"x": x, "attention_mask": mask})
        distill(model, dense, given)
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_distance_of_logits():
    dense = Network()
    model, _ = small(dense)
    record = distill(model, dense, batches(20), distance=soft_cross_entropy(1.0), hidden=0.0)
    assert max(record.scores) > record.first_score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must lie between 0 and 1, got 0"),
        ({"hidden": -1.0}, "hidden must be at least 0 and finite, got -1"),
        ({"batches": batches(1)}, "batches must hold at least two, since one is held out, got 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    dense = Network()
    model, _ = small(dense)
    options = {"batches": batches(4), **options}
    with pytest.raises(ValueError, match=message):
        distill(model, dense, **options)


def test_networks_that_cannot_be_trained_are_refused():
    dense = Network()
    with pytest.raises(ValueError, match=r"must have its own parameters, but shares 'blocks\.0"):
        distill(dense, dense, batches(4))
    half = small(dense)[0].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16: use model\.float\(\)"):
        distill(half, dense, batches(4))
    frozen = small(dense)[0].requires_grad_(False)
    with pytest.raises(ValueError, match="must store values, biases or norms"):
        distill(frozen, dense, batches(4))


def test_outputs_that_cannot_be_compared_are_refused():
    class Other(Network):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def forward(self, x):
            return self.change(super().forward(x))

    dense = Network()
    model, _ = small(dense)
    before = copy.deepcopy(model.state_dict())
    wide = Other(lambda y: torch.cat([y, y], -1))
    with pytest.raises(
        ValueError, match=r"of shape \(4, 8, 4\) as model does, got \(4, 8, 8\) for"
    ):
        distill(model, wide, batches(4))
    broken = batches(10)
    broken[3] = broken[3] * torch.nan
    with pytest.raises(ValueError, match="finite outputs, but does not for batch 3"):
        distill(model, dense, broken)
    for change in (lambda y: y.mean(), lambda y: y.argmax(-1)):
        chosen = Other(change)
        with pytest.raises(ValueError, match="must give outputs with an entry for each sample"):
            distill(small(chosen)[0], chosen, batches(4))
    kept = model.state_dict()
    assert all(torch.isfinite(each).all() for each in kept.values())
    assert kept.keys() == before.keys()


def test_it_trains_without_gradients_around_it_and_with_empty_batches():
    dense = Network()
    first, second = (small(dense)[0] for _ in range(2))
    distill(first, dense, batches(10))
    with torch.no_grad():
        distill(second, dense, [torch.empty(0, 8, 16), *batches(10)])
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
