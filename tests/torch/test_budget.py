"""Budgets over the layers of a network."""

import copy
import math

import pytest
from joblib import parallel_config

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact import LowRank  # noqa: E402
from matfact.allocation import allocate, allocate_uniformly, apply_seconds  # noqa: E402
from matfact.torch import Budget, compress, layer_options, output_sensitivity  # noqa: E402

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


@pytest.mark.parametrize("cost", ["nbytes", "flops"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_budget_is_kept_and_used_and_beats_uniform_densities(cost, share, network):
    small, report = compress(network, METHODS, budget=Budget(share, cost=cost))
    spent = sum(getattr(row, cost) or getattr(row, f"dense_{cost}") for row in report)
    dense = sum(getattr(row, f"dense_{cost}") for row in report)
    assert 0.9 * share * dense < spent <= share * dense
    facts = report.metadata["budget"]
    assert spent <= facts["planned"] <= facts["ceiling"] == pytest.approx(share * dense)
    options = layer_options(network, METHODS, (0.1, 0.2, 0.35, 0.5, 0.75))
    errors = [row.relative_error or 0.0 for row in report]
    for method in METHODS:
        uniform = allocate_uniformly(options, share * dense, method=method, cost=cost)
        assert sum(error**2 for error in errors) <= uniform.error
    assert len(list(small)) == len(list(network))


def test_a_budget_of_bytes_is_their_number_or_a_share(network):
    dense = compress(network, "magnitude", dry_run=True).report.dense_nbytes
    absolute, relative = (
        compress(network, "magnitude", budget=budget).report.rows for budget in (dense // 2, 0.5)
    )
    assert [row.density for row in absolute] == [row.density for row in relative]


def test_a_budget_leaves_overrides_and_kept_layers_as_they_are(network):
    given = {"2": None, "^4$": ("lowrank", 0.5)}
    _, report = compress(network, "magnitude", budget=0.8, overrides=given, keep=("first",))
    assert [row.method for row in report][:3] == ["", "", "LowRank"]
    assert [row.status for row in report][:3] == ["kept", "kept", "compressed"]
    assert report[2].requested_density == 0.5
    assert report.nbytes <= 0.8 * report.dense_nbytes


def test_a_trial_of_a_budget_changes_nothing_and_names_what_would_be_done(network):
    same, planned = compress(network, LowRank(), budget=0.5, dry_run=True)
    assert same is network
    assert f"{len(planned)} layers to compress" in repr(planned)  # and not "0 of 4 compressed"
    done = compress(network, LowRank(), budget=0.5).report
    assert {row.status for row in planned} <= {"planned", "kept"}
    assert [r.requested_density for r in planned] == [r.requested_density for r in done]


def test_calls_of_layers_count_where_batches_tell_them(network, batches):
    _, report = compress(
        network,
        "lowrank",
        budget=Budget(0.5, cost="flops"),
        calibration=iter(batches),
        dry_run=True,
    )
    rows = {row.layer: row for row in report}
    positions = {"0": 16, "2": 4, "4": 1, "6": 1}
    dense = sum(rows[name].dense_flops * count for name, count in positions.items())
    assert report.metadata["budget"]["ceiling"] == pytest.approx(dense / 2)


def test_time_can_be_bounded(network):
    _, report = compress(network, "lowrank", budget=Budget(1.0, cost="seconds"), dry_run=True)
    assert report.metadata["budget"]["planned"] <= report.metadata["budget"]["ceiling"]


def test_layers_that_matter_more_get_more(network):
    stored = []
    for name in ("4", "6"):
        budget = Budget(0.4, weights={name: 100.0})
        _, report = compress(network, "magnitude", budget=budget, layers=["4", "6"])
        stored.append({row.layer: row.density or 1.0 for row in report})
    assert stored[0]["6"] < stored[1]["6"]


def test_jobs_do_not_change_what_a_budget_gives(network):
    with parallel_config(backend="threading"):  # processes would take seconds to start
        one, two = (
            compress(network, "lowrank", budget=0.5, n_jobs=n, dry_run=True).report for n in (1, 2)
        )
    assert one.rows == two.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.5, "density": 0.5}, "density must be None with a budget"),
        ({"budget": 0}, "budget must be"),
        ({"budget": math.nan}, "budget must be"),
        ({"budget": 10}, "budget=10"),
        ({"budget": 0.5, "method": ()}, "method"),
        ({"budget": 0.5, "method": ("lowrank", LowRank(), LowRank())}, "must have different names"),
        ({"method": ("lowrank", "magnitude")}, "method must be"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(arguments, message, network):
    with pytest.raises(ValueError, match=message):
        compress(network, **{"method": "magnitude", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.5, "watts"), "cost must be"), ((2.0, "seconds"), "share")],
)
def test_costs_that_cannot_be_bounded_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(*arguments)


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


def test_layers_of_a_frozen_network_matter_as_much():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(20, 6)

    def loss(output, batch):
        return output.square().sum()

    expected = output_sensitivity(network, [x], loss)
    assert min(expected.values()) > 0
    network[0].requires_grad_(False)
    assert output_sensitivity(network, [x], loss) == pytest.approx(expected)
    network.requires_grad_(False)
    assert output_sensitivity(network, [x], loss) == pytest.approx(expected)
    with pytest.raises(ValueError, match="layer '0'"):
        output_sensitivity(network, [x.fill_(torch.nan)], loss)


def test_quantization_of_the_whole_matrix_is_an_option_of_a_budget(network):
    _, report = compress(
        network, ["lowrank", "rtn"], budget=Budget(0.15, densities=(0.2,), bits=(2, 4))
    )
    assert {row.method for row in report} <= {"RoundToNearest", "LowRank", ""}
    assert "RoundToNearest" in {row.method for row in report}
    assert sum(row.nbytes for row in report) <= 0.15 * report.dense_nbytes
