"""Allocation of a budget of bytes, FLOPs or seconds to layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from matfact.allocation._curves import DENSE, Option
from matfact.allocation._knapsack import select

Cost = Literal["nbytes", "flops", "seconds"]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Choice of an option for each layer within a budget.

    Attributes
    ----------
    options : dict of str to Option
        Option of each layer.
    cost : float
        Total cost.
    budget : float
        The budget.
    error : float
        Sum over layers of weight × squared error.
    lower_bound : float
        Lower bound on the `error` of any such choice within the budget.
    """

    options: dict[str, Option]
    cost: float
    budget: float
    error: float
    lower_bound: float

    @property
    def overrides(self) -> dict[str, tuple[str, float | None, float | None] | None]:
        """Method, density and bits of each layer, None for a kept layer; for ``compress``."""
        return {name: override(option) for name, option in self.options.items()}


def override(option: Option) -> tuple[str, float | None, float | None] | None:
    """Return the method, density and bits of an option, None for a kept layer."""
    if option.method == DENSE:
        return None
    density = None if math.isnan(option.density) else option.density
    return option.method, density, option.bits


def allocate(
    layers: Mapping[str, Sequence[Option]],
    budget: float,
    *,
    cost: Cost = "nbytes",
    weights: Mapping[str, float] | None = None,
) -> Allocation:
    """Choose a method and density for each layer to minimize the total error within a budget.

    Parameters
    ----------
    layers : mapping of str to sequence of Option
        Options of each layer, of any methods: see `measure_options` and `interpolate`.
    budget : float
        Maximum total cost, by the costs of the options.
    cost : {"nbytes", "flops", "seconds"}, default="nbytes"
        Kind of cost: bytes of values and positions, floating-point operations per sample, or
        measured time.
    weights : mapping of str to float, optional
        Weight of each layer's squared error, by default 1.

    Returns
    -------
    Allocation
        The options with the smallest ``Σ weight · error²``, and a lower bound for all others.

    Raises
    ------
    ValueError
        If an argument is invalid, or the cheapest options exceed the budget.

    Examples
    --------
    >>> from matfact.allocation import Option, allocate
    >>> def options(error):
    ...     return [Option("dense", 1.0, 0.0, 100, 50), Option("dsf", 0.5, error, 60, 25)]
    >>> layers = {"tolerant": options(0.1), "sensitive": options(0.3)}
    >>> {name: o.method for name, o in allocate(layers, budget=160).options.items()}
    {'tolerant': 'dsf', 'sensitive': 'dense'}
    """
    costs = _costs(layers, cost)
    weight = _weights(layers, weights)
    losses = [[weight[n] * option.error**2 for option in layers[n]] for n in layers]
    found = select(costs, losses, budget)
    chosen = {n: layers[n][k] for n, k in zip(layers, found.choices, strict=True)}
    return Allocation(chosen, found.cost, float(budget), found.error, found.lower_bound)


def allocate_uniformly(
    layers: Mapping[str, Sequence[Option]],
    budget: float,
    *,
    method: str,
    cost: Cost = "nbytes",
    weights: Mapping[str, float] | None = None,
) -> Allocation:
    """Choose one method and the largest common density for all layers, as a baseline.

    Parameters
    ----------
    layers, budget, cost, weights
        As in `allocate`.
    method : str
        The method. All layers need options for it at a common density, with floating-point values.

    Returns
    -------
    Allocation
        The result.

    Raises
    ------
    ValueError
        If an argument is invalid, or no common density is within the budget.
    """
    _costs(layers, cost)
    weight = _weights(layers, weights)
    by_density = {
        name: {
            option.density: option
            for option in options
            if option.method == method and option.bits is None
        }
        for name, options in layers.items()
    }
    common = set.intersection(*(set(found) for found in by_density.values()))
    for density in sorted(common, reverse=True):
        chosen = {name: found[density] for name, found in by_density.items()}
        total = math.fsum(getattr(option, cost) for option in chosen.values())
        if total <= budget:
            error = math.fsum(weight[n] * option.error**2 for n, option in chosen.items())
            return Allocation(chosen, total, float(budget), error, error)
    raise ValueError(
        f"budget={budget} is less than {method!r} needs in all layers at any common density among "
        f"{sorted(common)}."
    )


def _costs(layers: Mapping[str, Sequence[Option]], cost: str) -> list[list[float]]:
    if cost not in get_args(Cost):
        raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got {cost!r}.")
    if not layers:
        raise ValueError("layers must hold at least one layer, got none.")
    costs = [[float(getattr(option, cost)) for option in options] for options in layers.values()]
    if any(math.isnan(value) for values in costs for value in values):
        raise ValueError(f"cost={cost!r} must have been measured for all options.")
    for name, options in layers.items():
        if not all(math.isfinite(option.error) for option in options):
            raise ValueError(f"layers must hold options with finite errors, unlike {name!r}.")
    return costs


def _weights(
    layers: Mapping[str, Sequence[Option]], weights: Mapping[str, float] | None
) -> dict[str, float]:
    given = weights or {}
    if unknown := sorted(set(given) - set(layers)):
        raise ValueError(f"weights must name layers, got {', '.join(map(repr, unknown))}.")
    for name, value in given.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"weights must be finite and not negative, got {value} for {name!r}.")
    return {name: float(given.get(name, 1.0)) for name in layers}
