"""How much faster a compressed network is than its dense form."""

import time

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import FactorizedLinear, compress, measure_speed  # noqa: E402
from matfact.torch import speed as module  # noqa: E402


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.again = self.first

    def forward(self, x):
        return self.again(self.norm(self.first(x)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return compress(Tied(), "dsf", density=0.25)[0]


def test_the_twin_computes_the_same_and_shares_what_is_not_factorized(small):
    twin, layers = module._dense_twin(small.eval())
    x = torch.randn(5, 64)
    torch.testing.assert_close(twin(x), small(x))
    assert len(layers) == 1
    assert twin.first is twin.again is layers[0]
    assert twin.norm.weight is small.norm.weight
    assert isinstance(small.first, FactorizedLinear)


def test_kernels_inside_of_convolutions_get_no_dense_form_of_their_own():
    small, _ = compress(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), "dsf", density=0.5)
    twin, layers = module._dense_twin(small.eval())
    assert layers == [twin[0]]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(twin(x), small(x))


def test_times_are_those_of_the_two_networks(small, monkeypatch):
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    monkeypatch.setattr(FactorizedLinear, "to_dense", lambda layer: Slow(64, 64))
    speed = measure_speed(small, torch.randn(5, 64), turns=3)
    assert speed.dense_seconds > 0.04 > speed.seconds
    assert speed.speedup > 2
    assert speed.layers > 0.5
    assert speed.bound == pytest.approx(1 / (1 - speed.layers))


def test_the_network_is_left_as_it_was(small):
    small.train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    seen = []
    measure_speed(small, lambda network: seen.append(network(torch.randn(5, 64))), turns=1)
    assert len(seen) == 2 * 2 + 1
    assert small.training
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])
    assert not small.first._forward_hooks


def test_bad_arguments_are_refused(small):
    with pytest.raises(ValueError, match="model must have factorized layers, got none"):
        measure_speed(Tied(), torch.randn(5, 64))
    for turns in (0, True):
        with pytest.raises(
            ValueError, match=f"turns must be an integer of at least 1, got {turns}"
        ):
            measure_speed(small, torch.randn(5, 64), turns=turns)
    with pytest.raises(TypeError, match="batch must be an input or a function of model, got Tied"):
        measure_speed(small, Tied())
