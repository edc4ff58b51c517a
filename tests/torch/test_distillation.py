"""Compressed networks that learn to give the outputs of the dense one."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from torch import nn  # noqa: E402

from matfact.torch import compress, distill, save_network, soft_cross_entropy  # noqa: E402
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


@pytest.mark.parametrize("rate", [0.3, 0.99])
def test_a_rate_that_harms_is_lowered_until_it_helps(rate):
    dense = Network()
    model, _ = small(dense)
    before = _held_out(model, dense)
    record = distill(model, dense, batches(40), learning_rate=rate)
    assert record.scores[0] < 2 * record.first_score
    assert _held_out(model, dense) == pytest.approx(-max(record.scores), rel=0.01)
    assert _held_out(model, dense) < 0.7 * before


def test_training_that_never_helps_leaves_the_network_as_it_was():
    model, _ = small(Network())
    before = copy.deepcopy(model)
    with pytest.warns(ConvergenceWarning, match="network is as before") as seen:
        record = distill(model, before, batches(10))
    assert seen[0].filename == __file__
    assert record.best_epoch == 0
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in before.state_dict().items())


def test_infinite_losses_lower_the_rate_and_are_told():
    dense = Network()
    model, _ = small(dense)
    message = r"back to the best network: loss .* batch 3 of epoch 1\."
    with pytest.warns(ConvergenceWarning, match=message) as seen:
        record = distill(model, dense, batches(40), distance=_overflows_once())
    assert seen[0].filename == __file__
    assert math.isnan(record.losses[0])
    assert record.best_epoch > 1


def _overflows_once():
    calls = iter(range(100))

    def distance(output, target):
        error = (output - target).square().sum(-1)
        return error * math.inf if next(calls, None) == 10 else error

    return distance


def _held_out(model, dense):
    x = torch.cat(batches(40)[1::5])
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
        ({"epochs": 1.5}, "epochs must be an integer of at least 1, got 1.5"),
        ({"epochs": True}, "epochs must be an integer of at least 1, got True"),
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


@pytest.mark.parametrize(
    "given",
    [
        lambda y: (y.mean(), y),
        lambda y: {"loss": y.mean(), "logits": y},
        lambda y: {"loss": y.mean(), "scores": y},
        lambda y: (None, y.argmax(-1), y),
        lambda y: {"name": "text", "scores": y},
    ],
)
def test_the_output_is_found_among_losses_and_other_things(given):
    class Giving(Network):
        def forward(self, x):
            return given(super().forward(x))

    wanted, dense = Network(), Giving()
    records = [distill(small(each)[0], each, batches(4)) for each in (wanted, dense)]
    assert records[0].scores == records[1].scores


@pytest.mark.parametrize("given", [lambda y: y.mean(), lambda y: y.argmax(-1), lambda y: None])
def test_outputs_that_cannot_be_compared_are_refused(given):
    class Giving(Network):
        def forward(self, x):
            return given(super().forward(x))

    dense = Giving()
    with pytest.raises(ValueError, match="must return a tensor of real or complex numbers"):
        distill(small(dense)[0], dense, batches(4))


def test_one_number_for_each_sample_is_an_output():
    class Regression(Network):
        def forward(self, x):
            return super().forward(x).flatten(1).sum(1)

    dense = Regression()
    assert distill(small(dense)[0], dense, batches(4)).first_score < 0


def test_large_outputs_in_half_precision_do_not_overflow():
    class Half(Network):
        def forward(self, x):
            return (1000 * super().forward(x)).half()

    single, half = (
        distill(small(dense)[0], dense, batches(4), hidden=0).first_score
        for dense in (Network(), Half())
    )
    assert half == pytest.approx(single, rel=1e-2)


def test_outputs_of_other_shapes_are_refused_instead_of_broadcast():
    class Narrow(Network):
        def forward(self, x):
            return super().forward(x)[..., :1]

    with pytest.raises(ValueError, match="teacher must give outputs of the same shape as model"):
        distill(small(Network())[0], Narrow(), batches(4))


def test_the_batch_that_makes_scores_nan_is_told():
    given = batches(4)
    given[1] = given[1] * float("nan")
    dense = Network()
    with pytest.raises(ValueError, match="gives NaN for a held-out batch"):
        distill(small(dense)[0], dense, given)
    given = batches(4)
    given[3] = given[3] * float("nan")
    with pytest.raises(ValueError, match="gives NaN for a batch to train with"):
        distill(small(dense)[0], dense, given)


def test_blocks_are_found_in_wrapped_networks_and_missed_in_others():
    dense = Network()
    plain, wrapped = small(dense)[0], torch.nn.DataParallel(small(dense)[0])
    scores = [distill(each, dense, batches(4)).scores for each in (plain, wrapped)]
    assert scores[0] == scores[1]
    renamed = torch.nn.Sequential(dense)
    with pytest.raises(ValueError, match=r"blocks of the same names as model, such as 'blocks\.0"):
        distill(plain, renamed, batches(4))
    assert not plain._forward_pre_hooks
    distill(plain, renamed, batches(4), hidden=0)


def test_factors_of_a_single_layer_are_not_blocks():
    dense = torch.nn.Linear(16, 8)
    model, _ = compress(dense, "magnitude", density=0.5)
    distill(model, dense, list(torch.randn(4, 5, 16)))


def test_gradients_are_computed_in_a_caller_without_them():
    dense = Network()
    with torch.no_grad():
        record = distill(small(dense)[0], dense, batches(10))
    assert record.best_epoch > 0


def test_what_the_teacher_counts_is_restored():
    class Counting(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = x
            return super().forward(x)

    dense = Counting()
    model, _ = small(dense)
    distill(model, dense, batches(4))
    assert dense.calls == 0
    assert dense.last is None


def test_empty_batches_do_not_count():
    dense = Network()
    first, second = (small(dense)[0] for _ in range(2))
    distill(first, dense, batches(10))
    distill(second, dense, [torch.empty(0, 8, 16), *batches(10)])
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_a_report_of_another_network_is_refused(tmp_path):
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model, report = compress(dense, "magnitude", density=0.5)
    other, _ = compress(nn.Sequential(nn.Linear(8, 8)), "magnitude", density=0.5)
    with pytest.raises(ValueError, match=r"report must be of this network, but it names .* '2'"):
        distill(other, nn.Sequential(nn.Linear(8, 8)), batches(4), report=report)
    with pytest.raises(ValueError, match="report must be of this network"):
        save_network(other, tmp_path / "out", report=report)
    assert not (tmp_path / "out").exists()
    save_network(model, tmp_path / "out", report=report)


def test_it_trains_in_mixed_precision():
    dense = Network()
    model, _ = small(dense)
    before = distance(model, dense)
    with torch.autocast("cpu", torch.bfloat16):
        distill(model, dense, batches(40), learning_rate=0.01)
    assert distance(model, dense) < 0.8 * before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
