"""What reaches the layers, against what the layers were given."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import input_statistics  # noqa: E402
from matfact.torch._walk import walk  # noqa: E402


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
    for name, statistics in walk(model, ["first", "second", "unused"], batches):
        order.append(name)
        if name == "first":
            model.first = nn.Linear(6, 6, bias=False).requires_grad_(False)
            model.first.weight.zero_()
            assert torch.is_grad_enabled()
        else:
            X = np.concatenate([batch["x"].reshape(-1, 6).numpy() for batch in batches])
            np.testing.assert_allclose(statistics[0].gram, X.T @ X, rtol=1e-5, atol=1e-5)
    assert order == ["first", "second"]
    assert model.training


def test_a_walk_through_a_convolution_sees_patches_of_each_group():
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2)
    x = torch.randn(5, 4, 7, 8)
    model = nn.Sequential(nn.ReLU(), conv)
    (_, statistics), *_ = walk(model, ["1"], [(x, torch.zeros(5))])
    patches = nn.functional.unfold(torch.relu(x), (3, 2), padding=1, stride=2).chunk(2, dim=1)
    for group, found in zip(patches, statistics, strict=True):
        X = group.transpose(1, 2).reshape(-1, 12).double().numpy()
        np.testing.assert_allclose(found.gram, X.T @ X, rtol=1e-6, atol=1e-6)


def test_layers_with_the_same_input_share_their_statistics():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.out = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.out(self.query(x) * self.key(x))

    names = ["0.query", "0.key", "0.out"]
    found = dict(walk(nn.Sequential(Attention()), names, [torch.randn(5, 4)] * 2))
    assert found["0.query"] is found["0.key"]
    assert found["0.out"] is not found["0.key"]


def test_threads_and_patched_methods_are_gone_after_errors_and_early_ends(batches):
    class Broken(Residual):
        def forward(self, x, scale):
            self.first(x)
            raise RuntimeError("broken network")

    n_threads = threading.active_count()
    model = Residual()
    stops = walk(model, ["first", "second"], batches)
    next(stops)
    stops.close()
    broken = Broken()
    with pytest.raises(RuntimeError, match="broken network"):
        list(walk(broken, ["first", "second"], batches))
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
    (_, walked), *_ = walk(model, ["out"], [batch])
    for found in (input_statistics(model, [batch])["out"][0], walked[0]):
        assert found.count == 3
        np.testing.assert_allclose(found.gram, X.T @ X, rtol=1e-6)


def test_pairs_hold_the_inputs_of_the_dense_network_beside_those_now(batches):
    torch.manual_seed(0)
    model = Residual()
    dense = input_statistics(model, batches)["first"][0]
    with torch.no_grad():
        before = torch.cat([_hidden(model, b) for b in batches]).double().numpy()
        for name, statistics in walk(model, ["first", "second"], batches, paired=True):
            if name == "first":
                np.testing.assert_allclose(statistics[0].cross, dense.gram, rtol=1e-6)
                model.first = nn.Linear(6, 6)
        now = torch.cat([_hidden(model, b) for b in batches]).double().numpy()
    np.testing.assert_allclose(statistics[0].cross, now.T @ before, rtol=1e-5)
    np.testing.assert_allclose(statistics[0].inputs.gram, now.T @ now, rtol=1e-5)


def _hidden(model, batch):
    x = batch["x"].reshape(-1, 6)
    return x + torch.relu(model.first(batch["scale"] * x))
