"""Scores of singular triples: fast and exact scores give the same ranking."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from matfact.allocation import rank_triples
from matfact.solvers.block_svd import Blocking
from matfact.torch import exact_triple_scores, triple_scores


def flat(scores):
    return np.concatenate([block for blocks in scores.values() for block in blocks])


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def trained(model, X, y):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module", params=["dense", "convolutional"])
def network(request, digits):
    torch.manual_seed(0)
    X, y = digits
    if request.param == "dense":
        model = nn.Sequential(
            nn.Linear(64, 48),
            nn.ReLU(inplace=True),
            nn.Linear(48, 48),
            nn.ReLU(),
            nn.Linear(48, 10),
        )
        return trained(model, X, y), X[:128]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding="same"), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return trained(model, X, y), X[:128]


@pytest.mark.parametrize("statistic", ["perturbation", "variance"])
def test_fast_scores_order_triples_as_exact_ones(network, statistic):
    model, X = network
    fast, exact = (
        scores(model, [X[:64], X[64:]], statistic=statistic)
        for scores in (triple_scores, exact_triple_scores)
    )
    assert spearmanr(flat(fast), flat(exact))[0] > 0.95
    # Each layer on its own too, and the last one, linear to the outputs, exactly.
    last = list(exact)[-1]
    np.testing.assert_allclose(flat({last: fast[last]}), flat({last: exact[last]}), rtol=1e-3)


def test_blocks_have_their_own_triples(network):
    model, X = network
    layer = next(n for n, module in reversed([*model.named_modules()]) if hasattr(module, "weight"))
    scores = [
        f(model, [X], [layer], grids={layer: (2, 3)}) for f in (triple_scores, exact_triple_scores)
    ]
    blocking = Blocking(tuple(model.get_submodule(layer).weight.shape), (2, 3))
    assert [len(s) for s in scores[0][layer]] == [
        min(r1 - r0, c1 - c0) for r0, r1, c0, c1 in blocking.spans
    ]
    np.testing.assert_allclose(flat(scores[0]), flat(scores[1]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("statistic", ["perturbation", "variance"])
def test_scores_of_a_linear_layer_are_those_in_closed_form(statistic):
    torch.manual_seed(0)
    layer, X = nn.Linear(6, 5).double(), torch.randn(40, 6, dtype=torch.float64) + 1
    scores = triple_scores(layer, [X], statistic=statistic)[""][0]
    _, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    along = X @ Vh.T
    if statistic == "perturbation":
        expected = s**2 * (along**2).mean(0)
    else:
        expected = s**2 * along.var(0, correction=0) / 5
    np.testing.assert_allclose(scores, expected.numpy())


def test_random_probes_estimate_the_scores_of_many_outputs_without_bias():
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 300)), torch.randn(64, 8)
    exact = flat(triple_scores(model, [X], n_probes=300))
    estimates = [
        flat(triple_scores(model, [X], n_probes=16, random_state=seed)) for seed in range(40)
    ]
    np.testing.assert_allclose(np.mean(estimates, axis=0), exact, rtol=0.25)


def test_the_network_is_left_as_it_was(network):
    model, X = network
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for scores in (triple_scores, exact_triple_scores):
        scores(model, [X[:8]])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


def test_frozen_networks_are_scored_too(network):
    model, X = network
    usual = flat(triple_scores(model, [X[:16]]))
    model.requires_grad_(False)
    try:
        np.testing.assert_allclose(flat(triple_scores(model, [X[:16]])), usual, rtol=1e-5)
    finally:
        model.requires_grad_(True)


def test_triples_ranked_by_perturbation_cost_the_outputs_less_than_by_size(network):
    model, X = network
    scores = triple_scores(model, [X])
    weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in scores}
    parts = {name: torch.linalg.svd(W, full_matrices=False) for name, W in weights.items()}
    sizes = {name: [parts[name][1].numpy()] for name in scores}
    costs = {name: np.array([sum(W.shape)]) for name, W in weights.items()}
    budget = (
        sum(len(s[0]) * c[0] for s, c in zip(scores.values(), costs.values(), strict=True)) // 2
    )

    def loss(ranking):
        kept, reference = rank_triples(ranking, costs, budget), model.eval()(X)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for name, (U, s, Vh) in parts.items():
                k = kept[name][0]
                weight = model.get_submodule(name).weight
                weight.copy_(((U[:, k] * s[k]) @ Vh[k]).reshape(weight.shape))
            error = float(((model(X) - reference) ** 2).sum())
        model.load_state_dict(state)
        return error

    assert loss(scores) < loss(sizes)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)])
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="layers must name"):
        triple_scores(nn.Sequential(layer), [torch.ones(1, 4, 8, 8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "median"}, "statistic must be one of"),
        ({"grids": {"9": (1, 2)}}, "grids must name layers"),
    ],
)
@pytest.mark.parametrize("scores", [triple_scores, exact_triple_scores])
def test_bad_parameters_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        scores(nn.Sequential(nn.Linear(3, 2)), [torch.ones(4, 3)], **options)


class Twice(nn.Module):
    """A layer that is called twice, and adds what is small to its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        with torch.no_grad():
            self.layer.weight *= 0.05

    def forward(self, x):
        x = x + self.layer(x)
        return x[:, :3] + self.layer(2 * x)[:, :3]


def test_every_call_of_a_layer_counts():
    torch.manual_seed(0)
    model, X = Twice(), torch.randn(64, 8)
    fast, exact = (flat(f(model, [X])) for f in (triple_scores, exact_triple_scores))
    np.testing.assert_allclose(fast[:4], exact[:4], rtol=0.2)


def test_weights_that_are_computed_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="with a plain weight, got '0'"):
        exact_triple_scores(model, [torch.ones(2, 8)])
