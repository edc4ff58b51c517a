"""Statistics of layer inputs, compared with the recorded inputs."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import input_statistics  # noqa: E402
from matfact.torch.calibration.sequential import sequential_statistics  # noqa: E402


class Residual(nn.Module):
    """Keyword arguments, a skip connection, a layer called twice and one that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x, *, scale):
        h = x + torch.relu_(self.first(input=scale * x))
        return h + self.second(self.second(h))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(n, 3, 6, generator=generator), "scale": 2.0} for n in (4, 2, 5)]


def test_statistics_are_those_of_all_inputs(batches):
    torch.manual_seed(0)
    statistics = input_statistics(Residual(), iter(batches))
    X = 2 * np.concatenate([batch["x"].reshape(-1, 6).numpy() for batch in batches])
    assert statistics["first"][0].count == len(X)
    np.testing.assert_allclose(statistics["first"][0].gram, X.T @ X, rtol=1e-5, atol=1e-5)
    assert statistics["second"][0].count == 2 * len(X)  # called twice
    assert "unused" not in statistics


def test_a_walk_sees_what_replaced_layers_put_out(batches):
    torch.manual_seed(0)
    model = Residual().train()
    order = []
    for name, statistics in sequential_statistics(model, ["first", "second", "unused"], batches):
        order.append(name)
        if name == "first":
            model.first = nn.Linear(6, 6, bias=False).requires_grad_(False)
            model.first.weight.zero_()
            assert torch.is_grad_enabled()
        else:
            with torch.no_grad():
                h = torch.cat([batch["x"].reshape(-1, 6) for batch in batches])
                X = torch.cat([h, model.second(h)]).numpy()
            ((fitted, aside),) = statistics.by_matrix()
            assert (fitted.count, aside.count) == (2 * 27, 2 * 6)  # called twice
            both = fitted.gram + aside.gram
            np.testing.assert_allclose(both, X.T @ X, rtol=1e-5, atol=1e-5)
    assert order == ["first", "second"]
    assert model.training


def test_a_walk_through_a_convolution_sees_patches_of_each_group():
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2)
    x = torch.randn(5, 4, 7, 8)
    model = nn.Sequential(nn.ReLU(), conv)
    (_, statistics), *_ = sequential_statistics(model, ["1"], [(x, torch.zeros(5))])
    patches = nn.functional.unfold(torch.relu(x), (3, 2), padding=1, stride=2).chunk(2, dim=1)
    for group, (found, aside) in zip(patches, statistics.by_matrix(), strict=True):
        assert aside is None  # there is one batch only
        X = group.transpose(1, 2).reshape(-1, 12).double().numpy()
        np.testing.assert_allclose(found.gram, X.T @ X, rtol=1e-6, atol=1e-6)


def test_layers_with_the_same_input_are_seen_in_one_go():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.out = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.out(self.query(x) * self.key(x))

    names, calls = ["0.query", "0.key", "0.out"], []
    model = nn.Sequential(Attention())
    stops = sequential_statistics(model, names, [torch.randn(5, 4)] * 2)
    query = next(stops)
    model[0].query.register_forward_hook(lambda *_: calls.append("query"))
    key = next(stops)
    assert not calls
    out = next(stops)
    assert calls
    assert [query[0], key[0], out[0]] == names
    np.testing.assert_array_equal(query[1].fitted[0].gram, key[1].fitted[0].gram)


def test_threads_and_patched_methods_are_gone_after_errors_and_early_ends(batches):
    class Broken(Residual):
        def forward(self, x, scale):
            self.first(x)
            raise RuntimeError("broken network")

    n_threads = threading.active_count()
    model = Residual()
    stops = sequential_statistics(model, ["first", "second"], batches)
    next(stops)
    stops.close()
    broken = Broken()
    with pytest.raises(RuntimeError, match="broken network"):
        list(sequential_statistics(broken, ["first", "second"], batches))
    assert threading.active_count() == n_threads
    assert all("forward" not in vars(m.first) for m in (model, broken))


def test_what_is_no_layer_and_what_is_no_batch_is_refused():
    with pytest.raises(ValueError, match="layers"):
        input_statistics(nn.Sequential(nn.ReLU()), [torch.ones(1)], ["0"])
    for layers in (["no_such"], "no_such"):
        with pytest.raises(ValueError, match="got 'no_such'"):
            input_statistics(nn.Sequential(nn.Linear(1, 1)), [torch.ones(1)], layers)
    with pytest.raises(ValueError, match="batches"):
        input_statistics(nn.Sequential(nn.Linear(1, 1)), [])


def test_layers_are_found_by_name_or_by_a_regular_expression():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    found = [input_statistics(model, [torch.ones(1, 2)], layers) for layers in ("[12]", ["2"])]
    assert [list(statistics) for statistics in found] == [["2"], ["2"]]


def test_padding_does_not_count():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            return self.out(self.embed(input_ids)).sum(1)

    model = Tokens()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": mask}
    X = model.embed.weight.detach()[[0, 1, 3]].double().numpy()
    (_, walked), *_ = sequential_statistics(model, ["out"], [batch])
    for found in (input_statistics(model, [batch])["out"][0], walked.fitted[0]):
        assert found.count == 3
        np.testing.assert_allclose(found.gram, X.T @ X, rtol=1e-6)


def test_pairs_hold_the_outputs_of_the_dense_network_beside_the_inputs_now(batches):
    torch.manual_seed(0)
    model = Residual()
    before = [_entering_second(model, b) for b in batches]
    stops = sequential_statistics(model, ["first", "second"], batches, paired=True)
    next(stops)
    weights = {name: 0.8 * values for name, values in model.first.state_dict().items()}
    model.first = nn.Linear(6, 6)
    model.first.load_state_dict(weights)
    _, statistics = next(stops)
    now = [_entering_second(model, b) for b in batches]
    W = model.second.weight.detach().double().numpy()
    ((fitted, aside),) = statistics.by_matrix()
    for found, chosen in ((fitted, [0, 2]), (aside, [1])):
        X, Y = (np.concatenate([each[i] for i in chosen]) for each in (now, before))
        np.testing.assert_allclose(found.inputs.gram, X.T @ X, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.cross, X.T @ Y @ W.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.energy, np.sum((Y @ W.T) ** 2), rtol=1e-5)


@torch.no_grad()
def _entering_second(model, batch):
    """Return the inputs of both calls."""
    x = batch["x"].reshape(-1, 6)
    h = x + torch.relu(model.first(batch["scale"] * x))
    return torch.cat([h, model.second(h)]).double().numpy()
