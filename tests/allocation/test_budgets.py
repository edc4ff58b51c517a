"""Budgets over the layers of a network: measured options, interpolated and chosen."""

import math

import numpy as np
import pytest
import torch

from matfact import DoubleSparseFactorizer, LowRank, MagnitudePruner, RoundToNearest, metrics
from matfact.allocation import (
    Option,
    allocate,
    allocate_uniformly,
    apply_seconds,
    interpolate,
    measure_options,
)
from matfact.operators import FactorProduct, SparseFactor

METHODS = {"lowrank": LowRank(), "magnitude": MagnitudePruner()}
DENSITIES = (0.1, 0.25, 0.5)


@pytest.fixture(scope="module")
def weights():
    """Layers that suit different methods."""
    rng = np.random.RandomState(0)
    thin = rng.randn(48, 3) @ rng.randn(3, 64) + 0.01 * rng.randn(48, 64)
    spiky = np.where(rng.random_sample((48, 64)) < 0.08, rng.randn(48, 64), 0.0)
    return {
        "thin": thin.astype(np.float32),
        "spiky": (spiky + 0.01 * rng.randn(48, 64)).astype(np.float32),
        "noise": rng.randn(64, 48).astype(np.float32),
    }


@pytest.fixture(scope="module")
def layers(weights):
    return {name: measure_options(W, METHODS, DENSITIES) for name, W in weights.items()}


def test_options_are_what_a_fit_gives(weights):
    W = weights["noise"]
    gram = np.diag(np.arange(1.0, 49))
    options = measure_options(W, METHODS, DENSITIES, gram=gram)
    assert options[0] == Option("dense", 1.0, 0.0, W.nbytes, 2 * W.size, options[0].seconds)
    assert [(o.method, o.density) for o in options[1:]] == [
        (method, density) for method in METHODS for density in DENSITIES
    ]
    pruned = MagnitudePruner(density=0.25).fit(W)
    option = options[-2]
    assert 8 * option.nbytes == pytest.approx(pruned.bits_per_weight_ * W.size)
    assert option.flops == pruned.operator_.flops
    assert option.error == metrics.layer_error(W, pruned.operator_.toarray(), gram)
    assert math.isnan(option.seconds)


def test_densities_too_small_for_a_method_are_left_out_and_other_faults_are_not():
    W = np.ones((2, 2))
    found = {(o.method, o.density) for o in measure_options(W, METHODS, [0.25, 1.0])}
    assert ("lowrank", 0.25) not in found
    assert {("lowrank", 1.0), ("magnitude", 0.25)} <= found
    with pytest.raises(ValueError, match="max_iter"):
        measure_options(W, {"dsf": DoubleSparseFactorizer(max_iter=-1)}, [1.0])
    with pytest.raises(ValueError, match="NaN"):
        measure_options(np.full((2, 2), np.nan), METHODS, [1.0])
    with pytest.raises(ValueError, match="density"):
        measure_options(W, METHODS, [2.0])


def test_each_layer_gets_the_method_that_suits_it(layers):
    budget = 0.5 * sum(options[0].nbytes for options in layers.values())
    found = allocate(layers, budget)
    assert found.options["thin"].method == "lowrank"
    assert found.options["spiky"].method == "magnitude"
    assert found.cost == sum(option.nbytes for option in found.options.values()) <= budget
    assert found.error == pytest.approx(sum(o.error**2 for o in found.options.values()))
    assert found.lower_bound == pytest.approx(found.error, rel=1e-9)


@pytest.mark.parametrize("cost", ["nbytes", "flops"])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.6, 0.9])
def test_no_uniform_density_of_any_method_is_better(cost, share, layers):
    budget = share * sum(getattr(options[0], cost) for options in layers.values())
    found = allocate(layers, budget, cost=cost)
    assert found.cost <= budget
    for method in METHODS:
        uniform = allocate_uniformly(layers, budget, method=method, cost=cost)
        assert len({option.density for option in uniform.options.values()}) == 1
        assert uniform.cost <= budget
        assert found.error <= uniform.error * (1 + 1e-12)


def test_a_layer_that_matters_more_gets_more(layers):
    budget = 0.5 * sum(options[0].nbytes for options in layers.values())
    plain = allocate(layers, budget).options["spiky"]
    weighted = allocate(layers, budget, weights={"spiky": 1e9}).options["spiky"]
    assert weighted.error < plain.error


def test_predictions_between_fits_are_close_and_never_cheaper_than_the_fit(weights):
    for W in weights.values():
        options = measure_options(W, METHODS, DENSITIES)
        between = interpolate(options, [0.05, 0.15, 0.25, 0.35, 0.7])[len(options) :]
        assert {(o.method, o.density) for o in between} == {
            (method, density) for method in METHODS for density in (0.15, 0.35)
        }
        for option in between:
            fitted = METHODS[option.method].set_params(density=option.density).fit(W)
            assert 8 * option.nbytes >= fitted.bits_per_weight_ * W.size * (1 - 1e-12)
            assert option.flops >= fitted.operator_.flops
            low, high = (
                o.error
                for o in options
                if o.method == option.method and abs(o.density - option.density) < 0.16
            )
            assert high <= option.error <= low


def test_budgets_of_time_need_times(weights):
    ticks = iter(range(1, 100))
    timed = {
        name: measure_options(W, METHODS, DENSITIES, latency=lambda operator: next(ticks) / 10)
        for name, W in weights.items()
    }
    assert allocate(timed, 2.5, cost="seconds").cost <= 2.5
    untimed = {"noise": measure_options(weights["noise"], METHODS, DENSITIES)}
    with pytest.raises(ValueError, match="cost='seconds' must have been measured"):
        allocate(untimed, 1.0, cost="seconds")


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_times_are_of_the_operator_where_it_lives(library):
    W = np.eye(8, dtype=np.float32)
    product = FactorProduct([SparseFactor.from_dense(torch.eye(8) if library == "torch" else W)])
    assert 0 < apply_seconds(product, batch=3, repeats=3) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": "watts"}, "cost must be one of"),
        ({"weights": {"other": 1.0}}, "weights must name layers, got 'other'"),
        ({"weights": {"noise": -1.0}}, "not negative"),
        ({"weights": {"noise": math.nan}}, r"finite .* 'noise'"),
        ({"layers": {"l": [Option("dense", 1.0, math.nan, 8, 8)]}}, "finite errors, unlike 'l'"),
        ({"budget": 10}, "budget=10 must be at least"),
        ({"layers": {}}, "at least one layer"),
    ],
)
def test_bad_arguments_are_named(change, message, layers):
    arguments = {"layers": layers, "budget": 1e5} | change
    with pytest.raises(ValueError, match=message):
        allocate(arguments.pop("layers"), arguments.pop("budget"), **arguments)


def test_a_budget_that_no_uniform_density_meets_is_refused(layers):
    with pytest.raises(ValueError, match="budget=10 is less"):
        allocate_uniformly(layers, 10, method="lowrank")


def test_methods_without_a_density_are_refused():
    with pytest.raises(ValueError, match="methods must have a density to choose, got rtn="):
        measure_options(np.eye(8), METHODS | {"rtn": RoundToNearest()}, [0.5])
