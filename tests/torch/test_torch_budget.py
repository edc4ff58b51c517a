"""Budgets over the layers of a network."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.allocation import allocate, allocate_uniformly, apply_seconds  # noqa: E402
from matfact.torch import compress, layer_options, output_sensitivity  # noqa: E402

METHODS, DENSITIES = ("lowrank", "magnitude"), (0.15, 0.3, 0.6)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.Flatten(),
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_compressed_network_keeps_the_budget(share, dtype, network, batches):
    model = copy.deepcopy(network).to(dtype)
    options = layer_options(model, METHODS, DENSITIES)
    assert list(options) == ["0", "2", "4", "6"]
    assert sum(found[0].nbytes for found in options.values()) == sum(
        layer.weight.nbytes for layer in model if hasattr(layer, "weight")
    )
    budget = share * sum(found[0].nbytes for found in options.values())
    allocation = allocate(options, budget)
    report = compress(model, overrides=allocation.overrides).report
    assert report.nbytes == allocation.cost <= budget
    for method in METHODS:
        uniform = allocate_uniformly(options, budget, method=method)
        assert allocation.error <= uniform.error * (1 + 1e-12)


def test_errors_on_inputs_are_those_that_compressing_reports(network, batches):
    options = layer_options(network, ["lowrank"], [0.5], calibration=batches)
    report = compress(network, "lowrank", density=0.5, calibration=batches, sequential=False).report
    for row in report:
        assert options[row.layer][1].error == pytest.approx(row.layer_error, rel=1e-6)


def test_times_are_measured_where_asked(network):
    timed = layer_options(network, ["lowrank"], [0.5], latency=apply_seconds)
    assert all(option.seconds > 0 for found in timed.values() for option in found)
    untimed = layer_options(network, ["lowrank"], [0.5], layers="4")
    assert all(math.isnan(option.seconds) for option in untimed["4"])


def test_sensitivity_is_the_square_of_the_change_of_the_loss(network, batches):
    def loss(output, batch):
        return output.square().sum()

    found = output_sensitivity(network, batches, loss)
    layer, size = network[4], 1e-3
    torch.manual_seed(2)
    changes = []

    def disturb(module, args, output):
        noise = torch.randn_like(output)
        noise /= noise.norm(dim=-1, keepdim=True)
        return output + size * output.norm(dim=-1, keepdim=True) * noise

    with torch.no_grad():
        for _ in range(400):
            for batch in batches:
                plain = loss(network(batch), batch)
                handle = layer.register_forward_hook(disturb)
                changes.append(float(loss(network(batch), batch) - plain) ** 2 / size**2)
                handle.remove()
    # The mean of 1600 squares of nearly normal numbers is within 15 % at four standard errors.
    assert found["4"] == pytest.approx(sum(changes) / len(changes), rel=0.2)
    assert set(found) == {"0", "2", "4", "6"}
    assert all(value > 0 for value in found.values())


def test_a_layer_the_loss_does_not_depend_on_may_lose_everything(network, batches):
    found = output_sensitivity(network, batches, lambda output, batch: output[:, :0].sum())
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["magic"], [0.5]), "method must be"),
        (([], [0.5]), "methods must hold"),
        ((METHODS, [1.5]), "density"),
    ],
)
def test_bad_arguments_are_named(arguments, message, network):
    with pytest.raises(ValueError, match=message):
        layer_options(network, *arguments)
