"""Search for units, and ordinary smaller networks after pruning."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from matfact.calibration import OutputStatistics  # noqa: E402
from matfact.solvers.quadratic import quadratic  # noqa: E402
from matfact.torch.neurons import NeuronBlock, find_blocks, prune_neurons  # noqa: E402


class Transformer(nn.Module):
    """Attention and an MLP, gated or not, in residual blocks."""

    def __init__(self, gated, n_blocks=2, width=16, hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.gated, self.stem, self.head = gated, nn.Linear(8, width), nn.Linear(width, 3)
        names = ("gate", "up", "down", "query", "key", "value", "out")
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(*shapes.get(n, (width, width)), bias=n == "down")
                           for n in names if gated or n != "gate"} | {"norm": nn.LayerNorm(width)})
            for _ in range(n_blocks)
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            q, k, v = (
                block[name](x).unflatten(-1, (2, 8)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            attended = functional.scaled_dot_product_attention(q, k, v)
            x = x + block["out"](attended.transpose(1, 2).flatten(2))
            y = block["norm"](x)
            if self.gated:
                hidden = functional.silu(block["gate"](y)) * block["up"](y)
            else:
                hidden = functional.gelu(block["up"](y))
            x = x + block["down"](hidden)
        return self.head(x)


def output_error(model, pruned, x):
    with torch.no_grad():
        expected = model.eval()(x)
        return float((pruned.eval()(x) - expected).norm() / expected.norm())


def test_units_of_an_mlp_are_found(mlp, digits):
    blocks = find_blocks(mlp, digits.batches[0][0][:2])
    assert blocks == [
        NeuronBlock(("1",), (), "3", 64, 1), NeuronBlock(("3",), (), "5", 64, 1),
    ]  # fmt: skip


def test_channels_are_found_through_normalization_and_flattening(cnn, digits):
    blocks = find_blocks(cnn, digits.batches[0][0][:2])
    assert blocks == [
        NeuronBlock(("0",), ("1",), "3", 16, 9), NeuronBlock(("3",), ("4",), "7", 32, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
def test_units_of_transformers_are_found_and_heads_and_residuals_are_not(gated):
    blocks = find_blocks(Transformer(gated), torch.randn(2, 5, 8))
    producers = ("gate", "up") if gated else ("up",)
    assert [(set(b.producers), b.consumer, b.n_units) for b in blocks] == [
        ({f"blocks.{i}.{name}" for name in producers}, f"blocks.{i}.down", 32) for i in (0, 1)
    ]


def test_finding_units_leaves_the_network_as_it_is(cnn, digits):
    before, x = copy.deepcopy(cnn), digits.batches[0][0]
    find_blocks(cnn.train(), x[:2])
    assert cnn.training
    assert repr(cnn) == repr(before.train())
    for name, value in before.state_dict().items():
        assert torch.equal(cnn.state_dict()[name], value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cnn.modules())


def test_units_that_another_layer_reads_are_not_found():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.a(x).relu()
            return self.b(hidden) + self.c(hidden)

    assert find_blocks(Shared(), torch.randn(2, 4)) == []


@pytest.mark.parametrize("n_neurons", [0.5, 7])
def test_the_result_is_an_ordinary_smaller_network(cnn, digits, n_neurons):
    batches = [x for x, _ in digits.batches[:3]]
    before = copy.deepcopy(cnn.state_dict())
    result = prune_neurons(cnn, batches, n_neurons)
    kept = (7, 7) if n_neurons == 7 else (8, 16)
    classes = [type(module) for module in cnn.modules()]
    assert [type(module) for module in result.model.modules()] == classes
    conv1, norm1, _, conv2, norm2, _, _, head = result.model
    assert conv1.out_channels == norm1.num_features == conv2.in_channels == kept[0]
    assert conv2.out_channels == norm2.num_features == kept[1]
    assert head.in_features == 9 * kept[1] == head.weight.shape[1]
    assert conv2.weight.shape == (kept[1], kept[0], 3, 3)
    assert norm2.running_var.shape == (kept[1],)
    assert all(torch.equal(cnn.state_dict()[name], v) for name, v in before.items())
    # As ordinary as any: it trains and loads.
    result.model.train()(batches[0]).sum().backward()
    fresh = copy.deepcopy(result.model)
    fresh.load_state_dict(result.model.state_dict())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_accuracy_survives_without_fine_tuning(name, request, digits):
    model = request.getfixturevalue(name)
    batches = [x for x, _ in digits.batches]
    closed, published = (
        prune_neurons(model, batches, 0.25, method=method).model
        for method in ("least_squares", "ispasp")
    )
    dense = digits.accuracy(model)
    assert digits.accuracy(closed) > dense - 0.05
    assert digits.accuracy(closed) > digits.accuracy(published) + 0.05
    errors = [output_error(model, pruned, digits.test_x) for pruned in (closed, published)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("gated", [False, True])
def test_transformers_are_pruned_in_one_pass(gated):
    model, x = Transformer(gated), torch.randn(64, 5, 8)
    errors = []
    for n_neurons in (8, 16, 24, 32):
        result = prune_neurons(model, [{"x": x[:32]}, {"x": x[32:]}], n_neurons)
        assert [len(pruned.kept) for pruned in result.blocks] == [n_neurons] * 2
        assert result.model.blocks[1]["down"].weight.shape == (16, n_neurons)
        assert result.model.blocks[1]["up"].weight.shape == (n_neurons, 16)
        errors.append(output_error(model, result.model, x))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert errors[0] < 0.3


def test_copies_of_units_are_removed_without_loss(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    with torch.no_grad():
        model[0].weight[10:] = model[0].weight[:10]
        model[0].bias[10:] = model[0].bias[:10]
    x = torch.randn(100, 64).double()
    result = prune_neurons(model, [x[:50], x[50:]], 10)
    assert set(result.blocks[0].kept % 10) == set(range(10))
    assert output_error(model, result.model, x) < 1e-7


def test_the_bias_takes_over_the_mean_of_what_is_removed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[4:] = 0.0  # constant units
    x = torch.randn(200, 4)
    result = prune_neurons(model, [x], 4)
    np.testing.assert_array_equal(result.blocks[0].kept, range(4))
    assert output_error(model, result.model, x) < 1e-5


def test_the_reported_error_is_that_of_the_outputs_of_the_block(mlp, digits):
    batches = [x for x, _ in digits.batches]
    result = prune_neurons(mlp, batches, {"5": 6})
    assert [pruned.block.consumer for pruned in result.blocks] == ["5"]
    x = torch.cat(batches)
    with torch.no_grad():
        expected, found = mlp(x), result.model(x)
    spread = (expected - expected.mean(0)).norm()  # with a bias, the mean is free
    assert result.blocks[0].error == pytest.approx(
        float((found - expected).norm() / spread), rel=1e-3
    )


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_an_error_target_is_met_with_few_units(name, request, digits):
    model = request.getfixturevalue(name)
    batches = [x for x, _ in digits.batches]
    kept = []
    for max_error in (0.4, 0.1):
        result = prune_neurons(model, batches, max_error=max_error)
        for pruned in result.blocks:
            # The error is of the dense network's outputs, which earlier blocks may have moved.
            everything = len(pruned.kept) == pruned.block.n_units
            assert pruned.error <= max_error + 1e-6 or everything
        kept.append([len(pruned.kept) for pruned in result.blocks])
    assert all(few < many for few, many in zip(*kept, strict=True))


def test_pruning_in_place_returns_the_network_itself(mlp, digits):
    result = prune_neurons(mlp, [digits.batches[0][0]], 10, inplace=True)
    assert result.model is mlp
    assert mlp[1].out_features == mlp[3].in_features == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neurons": 65}, "n_neurons must be from 1 to the 64"),
        ({"n_neurons": 0.0}, "n_neurons"),
        ({"n_neurons": {"9": 3}}, "n_neurons must name consumers among"),
        ({"method": "omp"}, "method"),
        ({"max_error": 1.0}, "max_error must lie"),
        ({"max_error": 0.1, "n_neurons": 3}, "n_neurons must be None"),
        ({"max_error": 0.1, "method": "ispasp"}, "method must be 'least_squares'"),
        ({"batches": []}, "batches"),
    ],
)
def test_bad_arguments_of_neuron_pruning_are_refused(mlp, digits, options, message):
    with pytest.raises(ValueError, match=message):
        prune_neurons(mlp, **{"batches": [digits.batches[0][0]], **options})


def test_moments_give_the_gradient_that_autograd_gives():
    rng = np.random.RandomState(0)
    H = np.maximum(rng.randn(500, 24), 0)
    U = 100 * H @ rng.randn(24, 5)
    weights = rng.randn(24, 5)
    problem = quadratic(OutputStatistics().update(H, U))

    variable = torch.from_numpy(weights).requires_grad_()
    residual = torch.from_numpy(H) @ (problem.unit * variable) - torch.from_numpy(U)
    loss = 0.5 * residual.square().sum() * problem.energy / float(np.sum(U**2))
    gradient = torch.autograd.grad(loss, variable)[0].numpy()

    by_moments = problem.gram @ weights - problem.cross
    np.testing.assert_allclose(by_moments, gradient, atol=1e-10 * np.abs(gradient).max())
