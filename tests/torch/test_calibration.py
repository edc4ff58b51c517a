"""Calibration on unusual networks and batches."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact import ADMMPruner, DoubleSparseFactorizer  # noqa: E402
from matfact.calibration import InputStatistics  # noqa: E402
from matfact.torch import compress, input_statistics  # noqa: E402
from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside  # noqa: E402
from matfact.torch.calibration.sequential import sequential_statistics  # noqa: E402
from matfact.torch.compression._fit import fit_layer  # noqa: E402
from matfact.torch.running._batches import attended  # noqa: E402
from matfact.torch.running._random import RandomState  # noqa: E402


def relative(a, b):
    return float((a - b).norm() / b.norm())


class Drawing(nn.Module):
    """Keeps some tokens, drawn anew at each call by each generator that a network may use."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        kept = torch.as_tensor(self.draw(x.shape[1])).argsort()[:6]
        x = x[:, kept]
        return x + self.down(torch.relu(self.up(x)))


def python_draws(n):
    import random

    return [random.random() for _ in range(n)]


DRAWS = {"torch": torch.rand, "numpy": np.random.rand, "random": python_draws}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_batch_and_its_twin_draw_the_same_numbers(draw):
    torch.manual_seed(0)
    model = Drawing(DRAWS[draw]).eval()
    batches = [torch.randn(4, 24, 16) for _ in range(3)]
    before = torch.get_rng_state(), RandomState.now(torch.device("cpu")).numpy[1].copy()
    stops = sequential_statistics(model, ["up", "down"], batches, paired=True)
    for name, statistics in stops:  # nothing is replaced: each pair is one input twice
        assert not statistics.note
        for fitted, aside in statistics.by_matrix():
            for sums in (fitted, aside):
                np.testing.assert_allclose(sums.energy, _energy(model, sums, name), rtol=1e-6)
    torch.testing.assert_close(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(RandomState.now(torch.device("cpu")).numpy[1], before[1])


def _energy(model, sums, name):
    W = model.get_submodule(name).weight.detach().double().numpy()
    return np.trace(W @ sums.inputs.gram @ W.T)


class Shared(nn.Module):
    """Two layers called six times, and one in front of them that is called once."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = self.first(x)
        for _ in range(6):
            x = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        return x


def test_every_call_of_a_layer_counts_in_the_order_of_first_calls():
    torch.manual_seed(0)
    model, batches = Shared().eval(), [torch.randn(10, 8) for _ in range(2)]
    seen = [
        (name, statistics.count)
        for name, statistics in sequential_statistics(model, ["up", "down", "first"], batches)
    ]
    assert seen == [("first", 20), ("up", 120), ("down", 120)]
    rows = compress(model, "admm", density=0.5, calibration=batches)[1]
    assert [row.layer for row in rows] == ["first", "up", "down"]
    assert all(0 < row.layer_error < 1 for row in rows)


def test_layers_behind_repeated_ones_see_what_these_have_become():
    torch.manual_seed(0)
    model = nn.Sequential(Shared(), nn.Linear(16, 4)).eval()
    batches = [torch.randn(10, 8) for _ in range(2)]
    small, report = compress(model, "magnitude", density=0.3, calibration=batches)
    with torch.no_grad():
        X, U = small[0](batches[1]), model(batches[1])
        error, energy = U - small[1](X), U - model(batches[0]).mean(0)
    expected = float(error.norm() / energy.norm())
    assert report[-1].layer_error == pytest.approx(expected, rel=0.05)


def test_an_error_on_nothing_is_none():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.linear(0 * x)

    batches = [torch.randn(4, 8) for _ in range(2)]
    for sequential in (True, False):
        _, report = compress(
            Zeros(), "admm", density=0.5, calibration=batches, sequential=sequential
        )
        assert report[0].layer_error is None
        assert report[0].fitted_layer_error is None


def test_of_one_batch_nothing_is_kept_aside():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    assert compress(model, "dsf", density=0.5, calibration=[x])[1][0].layer_error is None
    assert compress(model, "dsf", density=0.5, calibration=[x, x])[1][0].layer_error is not None
    assert [i for i in range(12) if is_aside(i)] == [1, 6, 11]


@pytest.mark.parametrize("method", ["dsf", "magnitude"])
def test_the_error_reported_is_that_on_batches_kept_aside(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).eval()
    B = torch.randn(6, 12)
    batches = [torch.randn(32, 6) @ B for _ in range(5)]
    small, report = compress(model, method, density=0.5, calibration=batches)
    fitted = [x for i, x in enumerate(batches) if not is_aside(i)]
    with torch.no_grad():
        X, U = small[:2](batches[1]), model(batches[1])
        mean = torch.cat([model(x) for x in fitted]).mean(0)
        expected = float((U - small[2](X)).norm() / (U - mean).norm())
    assert report[1].layer_error == pytest.approx(expected, rel=1e-3)


def test_methods_that_use_inputs_are_fitted_to_all_batches_in_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False)).eval()
    B = torch.randn(12, 12)
    batches = [torch.randn(64, 12) @ B for _ in range(4)]
    small, report = compress(model, "admm", density=0.5, calibration=batches)
    W = model[0].weight.detach().numpy()
    inputs = InputStatistics().update(torch.cat(batches).numpy())
    expected = ADMMPruner(density=0.5).fit(W, calibration=inputs).operator_.toarray()
    np.testing.assert_allclose(small[0].to_product().toarray(), expected, rtol=1e-5, atol=1e-6)
    assert report[0].layer_error > report[0].fitted_layer_error


def test_what_other_batches_contradict_is_not_learned():
    # Few inputs of many features: corrections and refits to them are noise.
    rng = np.random.default_rng(0)
    W = rng.standard_normal((64, 64)).astype(np.float32)
    few, aside, fresh = (
        InputStatistics().update(rng.standard_normal((n, 64))) for n in (16, 64, 5000)
    )
    method = DoubleSparseFactorizer(0.5, max_iter=20)
    plain = fit_layer(method, [W], None)
    found = fit_layer(method, [W], LayerStatistics([few], [aside]))
    unaware = fit_layer(method, [W], LayerStatistics([few], [InputStatistics()]))
    errors = [_fresh_error(W, each, fresh) for each in (plain, found, unaware)]
    assert errors[1] <= 1.02 * errors[0]
    assert errors[1] < errors[2]


def _fresh_error(W, fitted, inputs):
    difference = W - fitted.products[0].toarray()
    return math.sqrt(np.trace(difference @ inputs.second_moment @ difference.T))


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_that_are_not_finite_are_named_before_any_work(sequential):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 8)
    x[3, 2] = math.nan
    before, done = copy.deepcopy(model.state_dict()), []
    with pytest.raises(ValueError, match=r"inputs.* layer '0'.* batch 1"):
        compress(
            model, "dsf", density=0.5, calibration=[torch.randn(16, 8), x], inplace=True,
            sequential=sequential, progress=lambda *row: done.append(row),
        )  # fmt: skip
    assert not done
    torch.testing.assert_close(model.state_dict(), before)


class Routed(nn.Module):
    """Sends each token to one of two experts."""

    def __init__(self, threshold):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.threshold = threshold

    def forward(self, x):
        x = self.first(x)
        left = x[:, 0] < self.threshold
        return torch.cat([self.experts[0](x[left]), self.experts[1](x[~left])])


@pytest.mark.parametrize("sequential", [True, False])
def test_experts_without_tokens_are_fitted_without(sequential):
    torch.manual_seed(0)
    batches = [torch.randn(32, 8), torch.empty(0, 8), torch.randn(5, 8)]
    with pytest.warns(UserWarning, match=r"experts\.1: no calibration input reached it"):
        _, report = compress(
            Routed(100.0), "dsf", density=0.9, calibration=batches, sequential=sequential
        )
    assert [row.status for row in report] == ["compressed"] * 3


def test_tokens_that_are_routed_elsewhere_are_no_pairs():
    torch.manual_seed(0)
    model = Routed(0.0).eval()
    _, report = compress(
        model, "magnitude", density=0.4, calibration=[torch.randn(40, 8) for _ in range(4)]
    )
    notes = {row.layer: row.message for row in report}
    assert "counterparts" in notes["experts.0"]
    assert not notes["first"]
    assert report[1].layer_error < 1.5


def test_complex_layers_are_fitted_without_and_say_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.complex64))
    x = torch.randn(64, 16, dtype=torch.complex64)
    for sequential in (True, False):
        with pytest.warns(UserWarning, match="inputs are complex"):
            small, _ = compress(model, "butterfly", calibration=[x], sequential=sequential)
        assert relative(small(x), model(x)) < 1
    with pytest.raises(ValueError, match="must be real"):
        input_statistics(model, [x])


def test_wrappers_hand_on_all_that_the_network_in_them_takes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    class Any(Two):
        def forward(self, *inputs):
            return super().forward(*inputs)

    pairs = [[torch.randn(8, 8), torch.randn(8, 8)] for _ in range(2)]
    labelled = [[*pair, torch.zeros(8)] for pair in pairs]
    for model, batches in ((nn.DataParallel(Two()), labelled), (Any(), pairs), (Two(), labelled)):
        small, report = compress(model, "magnitude", density=1.0, calibration=batches)
        assert len(report) == 2
        torch.testing.assert_close(small(*pairs[0]), model(*pairs[0]))


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("shape", [(3, 4, 5), (12, 5), (4, 3, 5), (3, 2, 4, 5), (3, 4, 2, 5)])
def test_padding_is_left_out_in_every_shape(shape):
    tokens = torch.arange(12.0).reshape(3, 4)
    layout = {
        (3, 4, 5): tokens[:, :, None], (12, 5): tokens.reshape(12, 1),
        (4, 3, 5): tokens.T[:, :, None],
        (3, 2, 4, 5): tokens[:, None, :, None], (3, 4, 2, 5): tokens[:, :, None, None],
    }[shape]  # fmt: skip
    x = layout.expand(shape)
    kept = attended(x, {"input_ids": tokens, "attention_mask": MASK}, nn.Identity())
    assert sorted(set(kept.flatten().tolist())) == sorted(tokens[MASK.bool()].tolist())
    assert kept.shape[-1] == 5


@pytest.mark.parametrize(
    "more", [{"decoder_input_ids": torch.zeros(3, 4)}, {"decoder_attention_mask": torch.ones(3, 4)}]
)
def test_a_mask_of_one_side_never_drops_tokens_of_the_other(more):
    x = torch.randn(3, 4, 5)
    kept = attended(x, {"attention_mask": MASK, **more}, nn.Identity())
    assert kept.numel() == x.numel()


def test_masks_that_are_no_masks_of_tokens_drop_nothing():
    x = torch.randn(3, 4, 5)
    for mask in (torch.rand(3, 4), torch.zeros(3, 4), torch.ones(3, 4, 4).tril()):
        assert attended(x, {"attention_mask": mask}, nn.Identity()) is x


def test_nested_tensors_count_without_padding():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 4:] = True

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(encoder, 1)

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask)

    model, batches = Net().eval(), [{"x": torch.randn(3, 6, 8), "mask": mask} for _ in range(2)]
    small, report = compress(model, "magnitude", density=1.0, calibration=batches)
    assert [row.status for row in report] == ["compressed"] * len(report)
    with torch.no_grad():
        torch.testing.assert_close(small(**batches[0]), model(**batches[0]), rtol=1e-4, atol=1e-5)


def test_compiled_networks_are_seen_as_they_are_written():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    compiled = torch.compile(model, backend="eager")
    x = [torch.randn(32, 8) for _ in range(2)]
    compiled(x[0])
    found = input_statistics(compiled, x)
    assert [each[0].count for each in found.values()] == [64, 64]


class Remembering(nn.Module):
    """Hands a tensor from one layer to the next in an attribute, and counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.n_calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.skip = torch.relu(self.a(x))
        self.n_calls += 1
        self.seen.append(self.n_calls)
        self.mean += 0.1 * (self.skip.mean(0) - self.mean)
        hidden = self.b(self.skip)
        return self.c(hidden + self.skip + self.mean)


@pytest.mark.parametrize("sequential", [True, False])
def test_batches_do_not_see_what_others_have_left_in_the_network(sequential):
    torch.manual_seed(0)
    model, batches = Remembering().eval(), [torch.randn(10, 8) for _ in range(4)]
    small, _ = compress(model, "magnitude", density=1.0, calibration=batches, sequential=sequential)
    assert small.n_calls == 0
    assert small.seen == []
    assert "skip" not in vars(small)
    torch.testing.assert_close(small.mean, torch.zeros(8))


def test_statistics_are_those_of_each_batch_alone():
    torch.manual_seed(0)
    model, batches = Remembering().eval(), [torch.randn(10, 8) for _ in range(4)]
    expected = InputStatistics()
    for x in batches:
        network = copy.deepcopy(model)
        network.c.register_forward_pre_hook(
            lambda layer, args: expected.update(args[0].detach().numpy()) and None
        )
        network(x)
    for name, statistics in sequential_statistics(model, ["a", "b", "c"], batches, paired=True):
        if name == "c":
            ((fitted, aside),) = statistics.by_matrix()
            gram = fitted.inputs.gram + aside.inputs.gram
            np.testing.assert_allclose(gram, expected.gram, rtol=1e-5)


def test_layers_that_batches_call_in_another_order_are_seen_by_all():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            first, second = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
            return self.c(torch.relu(second(torch.relu(first(x)))))

    torch.manual_seed(0)
    batches = [torch.randn(10, 8) for _ in range(4)]
    for x, sign in zip(batches, (1, -1, 1, -1), strict=True):
        x[0, 0] = sign
    counts = {
        n: s.count
        for n, s in sequential_statistics(Either(), ["a", "b", "c"], batches, paired=True)
    }
    assert counts == {"a": 40, "b": 40, "c": 40}


def test_generators_that_a_network_holds_draw_the_same_for_a_batch_and_its_twin():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * (torch.rand(x.shape, generator=self.generator) < 0.5))

    model = Dropping().eval()
    before = model.generator.get_state()
    for name, statistics in sequential_statistics(
        model, ["a", "b"], [torch.randn(9, 8)] * 2, paired=True
    ):
        assert not statistics.note
        for sums in statistics.by_matrix()[0]:
            np.testing.assert_allclose(sums.energy, _energy(model, sums, name), rtol=1e-6)
    torch.testing.assert_close(model.generator.get_state(), before)


def test_layers_that_a_plain_list_holds_are_kept():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
            self.steps = [self.a, self.b]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return self.c(x)

    small, report = compress(Listed(), "magnitude", density=0.5)
    assert [row.status for row in report] == ["kept", "kept", "compressed"]
    assert "steps also holds" in report[0].message
    assert small.steps[0] is small.a


def test_attention_that_skips_its_modules_in_eval_mode_is_calibrated():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.encoder(self.first(x))

    batches = [torch.randn(4, 5, 8) for _ in range(2)]
    _, report = compress(Encoder().eval(), "magnitude", density=0.5, calibration=batches)
    errors = {row.layer: row.layer_error for row in report}
    assert errors["encoder.linear1"] is not None
    assert errors["encoder.linear2"] is not None


def test_little_is_learned_of_inputs_that_few_samples_know():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).eval()
    with torch.no_grad():
        model[0].bias[:24] -= 2.2  # units that are seldom active
    batches = [torch.randn(64, 32) for _ in range(4)]
    _, report = compress(model, "dsf", density=0.4, calibration=batches)
    assert report[-1].relative_error < 1  # 3.2 where each input counts by its own norm alone


@pytest.mark.parametrize("batch", [torch.randn(4, 8), {"x": torch.randn(4, 8)}, "x"])
def test_one_batch_in_place_of_a_collection_is_refused(batch):
    with pytest.raises(ValueError, match="collection of batches"):
        compress(nn.Sequential(nn.Linear(8, 8)), "dsf", calibration=batch)


def test_masks_for_each_head_and_masks_that_are_added_count():
    x = torch.randn(3, 4, 5)
    added = torch.where(MASK.bool(), 0.0, torch.finfo(torch.float32).min)
    for mask in (MASK[:, None, None, :], MASK[:, None, :], added, added[:, None, None, :]):
        kept = attended(x, {"attention_mask": mask}, nn.Identity())
        torch.testing.assert_close(kept, x[MASK.bool()])
