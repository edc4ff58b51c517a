"""Splitting a budget of bytes, FLOPs or seconds between layers."""

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
    """An option for each layer, within a budget.

    Attributes
    ----------
    options : dict of str to Option
        What each layer gets.
    cost : float
        Their total cost.
    budget : float
        The ceiling it was chosen under.
    error : float
        Sum over layers of weight × squared error.
    lower_bound : float
        No choice of the kind asked for has a smaller `error` within the budget.
    """

    options: dict[str, Option]
    cost: float
    budget: float
    error: float
    lower_bound: float

    @property
    def overrides(self) -> dict[str, tuple[str, float] | None]:
        """Method and density of each layer, None for one left as it is: for `compress`."""
        return {
            name: None if option.method == DENSE else (option.method, option.density)
            for name, option in self.options.items()
        }


def allocate(
    layers: Mapping[str, Sequence[Option]],
    budget: float,
    *,
    cost: Cost = "nbytes",
    weights: Mapping[str, float] | None = None,
) -> Allocation:
    """Give each layer a method and a density so that the network loses least within a budget.

    Parameters
    ----------
    layers : mapping of str to sequence of Option
        For each layer what it may get, of any methods: see :func:`measure_options` and
        :func:`interpolate`.
    budget : float
        Ceiling of the total cost. It is never exceeded by the costs in the options.
    cost : {"nbytes", "flops", "seconds"}, default="nbytes"
        What is bounded: bytes of values and positions, floating point operations for a sample,
        or measured time.
    weights : mapping of str to float, optional
        How much the network suffers from a layer's squared error; 1 where none is given.

    Returns
    -------
    Allocation
        The options of least ``Σ weight · error²``, with a bound on what any others could reach.

    Raises
    ------
    ValueError
        If an argument is invalid or the cheapest options exceed the budget.

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
    """Give all layers one method and the largest density they can all have: the baseline.

    Parameters
    ----------
    layers, budget, cost, weights
        As for :func:`allocate`.
    method : str
        The method, of which all layers must have an option at some common density.

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
        name: {option.density: option for option in options if option.method == method}
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
        raise ValueError(f"weights must be of layers, got {', '.join(map(repr, unknown))}.")
    for name, value in given.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"weights must be finite and not negative, got {value} for {name!r}.")
    return {name: float(given.get(name, 1.0)) for name in layers}
