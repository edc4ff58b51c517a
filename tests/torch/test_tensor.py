"""Tensor baselines: exact at full rank, ordinary layers, ranks that see through noise."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorly")
from torch import nn  # noqa: E402

from matfact.torch.tensor_decomposition import (  # noqa: E402
    TensorTrain,
    balanced_factors,
    energy_rank,
    tensor_train,
    tucker_svd,
    vbmf_rank,
)


def low_rank_network(rank=3):
    """Return a network whose weights are of low rank in every unfolding."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
    model = nn.Sequential(
        conv, nn.ReLU(), nn.Conv1d(40, 40, 5), nn.ReLU(), nn.Linear(40, 32)
    ).double()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            out, inputs, *rest = layer.weight.shape
            core = torch.randn(rank, rank, *rest, dtype=torch.float64)
            left, right = torch.randn(out, rank).double(), torch.randn(rank, inputs).double()
            layer.weight.copy_(torch.einsum("oa,ab...,bi->oi...", left, core, right))
    return model


def n_values(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ranks", ["vbmf", 1.0])
def test_layers_of_low_rank_are_decomposed_without_loss(ranks):
    model = low_rank_network()
    small = tucker_svd(model, ranks=ranks, singular_values=0.1)
    assert n_values(small) < 0.3 * n_values(model)
    assert [type(module) for module in small[0]] == [nn.Conv2d] * 3
    assert (small[0][1].in_channels, small[0][1].out_channels) == (3, 3)
    assert [type(module) for module in small[4]] == [nn.Linear] * 2
    for i, x in enumerate([torch.randn(2, 16, 11, 9), None, torch.randn(2, 40, 12), None,
                           torch.randn(2, 40)]):  # fmt: skip
        if x is not None:
            torch.testing.assert_close(small[i](x.double()), model[i](x.double()))


def test_layers_that_would_grow_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    small = tensor_train(tucker_svd(model, ranks=1.0, singular_values=1.0), 100)
    assert list(small.state_dict()) == list(before)


@pytest.mark.parametrize("shape", [(30, 40), (16, 8, 3, 3), (10, 7), (12, 6, 5)])
def test_tensor_trains_of_full_rank_are_exact(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    train = TensorTrain(shape, 10**6, 4)
    cores = train.right_inverse(weight)
    assert sum(core.numel() for core in cores) == train.n_values
    torch.testing.assert_close(train(*cores), weight)


def test_tensor_trains_store_less_and_approximate_better_with_rank(mlp, digits):
    x, errors, sizes = digits.batches[0][0], [], []
    for max_rank in (2, 5, 9, 14):
        small = tensor_train(mlp, max_rank, layers=["1", "3"])
        sizes.append(n_values(small))
        errors.append(float((small(x) - mlp(x)).detach().norm()))
    assert sizes == sorted(sizes)
    assert sizes[-1] < n_values(mlp)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("compress", "options"),
    [(tucker_svd, {"ranks": 0.9, "singular_values": 0.5}), (tensor_train, {})],
)
def test_decomposed_networks_train(cnn, digits, compress, options):
    before = digits.accuracy(cnn)
    small = compress(cnn, **options)
    assert n_values(small) < n_values(cnn)
    optimizer = torch.optim.Adam(small.train().parameters(), lr=3e-3)
    for _ in range(3):
        for x, y in digits.batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(small(x), y).backward()
            optimizer.step()
    assert digits.accuracy(small) > min(before, 0.9)
    fresh = compress(cnn, **options)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh.eval()(digits.test_x), small.eval()(digits.test_x))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 200, 5), (200, 60, 1), (100, 100, 10)])
def test_variational_bayes_finds_the_rank_under_noise(rows, columns, rank):
    rng = np.random.RandomState(0)
    signal = rng.randn(rows, rank) @ rng.randn(rank, columns)
    assert vbmf_rank(signal + 0.3 * rng.randn(rows, columns)) == rank
    assert vbmf_rank(signal) == rank
    assert vbmf_rank(1e-8 * (signal + 0.3 * rng.randn(rows, columns))) == rank


def test_noise_alone_has_the_least_rank():
    assert vbmf_rank(np.random.RandomState(0).randn(50, 80)) == 1
    assert vbmf_rank(np.zeros((4, 5))) == 1


def test_energy_rank_is_the_least_that_suffices():
    matrix = np.diag([3.0, 2.0, 1.0])
    assert [energy_rank(matrix, share) for share in (0.1, 9 / 14, 0.7, 13 / 14, 1.0)] == [
        1, 1, 2, 2, 3,
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 7, 64, 288, 4608, 1000])
def test_factors_multiply_to_the_number(n):
    factors = balanced_factors(n, 4)
    assert math.prod(factors) == n
    assert len(factors) == 4


@pytest.mark.parametrize(
    ("compress", "options", "message"),
    [
        (tucker_svd, {"ranks": "cp"}, "ranks"),
        (tucker_svd, {"ranks": 0.0}, "ranks"),
        (tucker_svd, {"singular_values": 1.5}, "singular_values"),
        (tucker_svd, {"layers": ["2"]}, "layers"),
        (tensor_train, {"max_rank": 0}, "max_rank"),
        (tensor_train, {"n_cores": 0}, "n_cores"),
    ],
)
def test_bad_arguments_of_tensor_baselines_are_refused(mlp, compress, options, message):
    with pytest.raises(ValueError, match=message):
        compress(mlp, **options)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("decompose", [tucker_svd, tensor_train])
def test_what_is_decomposed_computes_what_its_class_does_alone(decompose):
    torch.manual_seed(0)
    layers = (nn.Linear(64, 64) for _ in range(4))
    model = nn.Sequential(*layers, Doubled(64, 64), nn.Linear(64, 64, dtype=torch.complex64))
    model[1].weight = model[0].weight
    model.append(model[2])
    before = copy.deepcopy(model)
    small = decompose(model)
    assert [type(small[i]) for i in (0, 1, 4, 5)] == [type(before[i]) for i in (0, 1, 4, 5)]
    assert small[0].weight is small[1].weight
    assert type(small[3]) is not nn.Linear
    assert small[6] is small[2]
    with pytest.raises(ValueError, match="'4' is none"):
        decompose(model, layers=["4"])


@pytest.mark.parametrize("decompose", [tucker_svd, tensor_train])
def test_decomposed_layers_keep_hooks_modes_and_what_is_frozen(decompose):
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 3)).eval()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    calls = []
    for layer in model:
        layer.register_forward_hook(lambda layer, args, output: calls.append(layer))
    small = decompose(model)
    assert not any(module.training for module in small.modules())
    for layer, frozen in zip(small, ("weight", "bias"), strict=True):
        for name, parameter in layer.named_parameters():
            assert parameter.requires_grad == (("bias" in name) != (frozen == "bias"))
    small[0](torch.ones(2, 64))
    small[1](torch.ones(2, 64, 5))
    assert calls == list(small)


@pytest.mark.parametrize("decompose", [tucker_svd, tensor_train])
def test_one_layer_can_be_decomposed(decompose):
    layer = nn.Linear(64, 64)
    small = decompose(layer)
    assert small(torch.ones(2, 64)).shape == (2, 64)
    assert n_values(small) < n_values(layer)
