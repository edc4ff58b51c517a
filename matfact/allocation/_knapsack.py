"""Multiple-choice knapsack: one option per layer with the smallest total error in a budget.

A Lagrangian relaxation gives a selection and a bound on all others. A search over the options not
excluded by the bound then finds the optimum. For 100 layers of 30 options this takes a tenth of a
second. HiGHS (``scipy.optimize.milp``) finds the same selection, but may not have proved it optimal
after 30 seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

#: Default maximum of partial selections, enough to prove optimality for hundreds of layers.
_MAX_STATES = 1 << 12
#: The same in a first search, whose result prunes most of the second.
_FEW_STATES = 1 << 8


@dataclasses.dataclass(frozen=True)
class Selection:
    """Result of `select`.

    Attributes
    ----------
    choices : tuple of int
        Option of each layer.
    cost : float
        Total cost, at most the budget.
    error : float
        Total error.
    lower_bound : float
        Lower bound on the error of all selections within the budget; equal to `error` if that is
        proven optimal.
    """

    choices: tuple[int, ...]
    cost: float
    error: float
    lower_bound: float


def select(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    budget: float,
    *,
    max_states: int = _MAX_STATES,
) -> Selection:
    """Choose one option per layer to minimize the total error within the budget.

    Parameters
    ----------
    costs, errors : sequence of sequences of float
        For each layer, the nonnegative costs and errors of its options.
    budget : float
        Maximum total cost.
    max_states : int, default=4096
        Maximum number of partial selections in the search. If there are more, the least promising
        are dropped, and ``lower_bound`` shows how much this may have cost.

    Returns
    -------
    Selection
        The best options, with a lower bound.

    Raises
    ------
    ValueError
        If the arguments are inconsistent, or the cheapest options exceed the budget.

    References
    ----------
    - H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11.

    Examples
    --------
    >>> from matfact.allocation import select
    >>> select([[1, 2, 4], [1, 3, 4]], [[9.0, 4.0, 0.0], [5.0, 1.0, 0.5]], budget=5)
    Selection(choices=(2, 0), cost=5.0, error=5.0, lower_bound=5.0)
    """
    unit = _unit(budget)
    layers = [_Layer.efficient(np.ceil(c / unit), e) for c, e in _checked(costs, errors, budget)]
    capacity = math.floor(budget / unit)
    if sum(layer.costs[0] for layer in layers) > capacity:
        least = math.fsum(float(min(c)) for c in costs)
        if least <= budget:  # up to rounding
            least = math.nextafter(budget, math.inf)
        raise ValueError(f"budget={budget} must be at least {least}, the least of all costs.")
    slope, picks = _relaxed(layers, capacity)
    search = _Search(layers, capacity, slope, picks)
    for states in sorted({min(_FEW_STATES, max_states), max_states}):
        search.run(states)
    choices = [int(layer.indices[pick]) for layer, pick in zip(layers, search.best, strict=True)]
    cost = math.fsum(costs[i][j] for i, j in enumerate(choices))
    error = math.fsum(errors[i][j] for i, j in enumerate(choices))
    return Selection(tuple(choices), cost, error, min(error, search.open_bound))


def _unit(budget: float) -> float:
    """Return the power of two used as the unit of costs, which are rounded up.

    The budget has fewer than 2⁵³ units, so sums of counts are exact; integers are exact too.
    """
    if not budget > 0 or not math.isfinite(budget):
        raise ValueError(f"budget must be a positive number, got {budget!r}.")
    return 2.0 ** (math.frexp(budget)[1] - 53)


def _checked(
    costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the arrays; costs above the budget are replaced by the next number above it."""
    if len(costs) != len(errors):
        raise ValueError(
            f"costs and errors must have equally many layers, got {len(costs)} and {len(errors)}."
        )
    pairs = []
    for i, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        c, e = np.asarray(cost, dtype=np.float64), np.asarray(error, dtype=np.float64)
        if c.ndim != 1 or c.shape != e.shape or not c.size:
            raise ValueError(
                f"costs and errors must have the same length, at least 1, for layer {i}."
            )
        if not (np.isfinite(c).all() and np.isfinite(e).all() and min(c.min(), e.min()) >= 0):
            raise ValueError(f"costs and errors must be finite and not negative, got layer {i}.")
        pairs.append((np.minimum(c, 2 * budget), e))
    return pairs


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Options of a layer, by increasing cost and decreasing error."""

    costs: np.ndarray
    errors: np.ndarray
    indices: np.ndarray

    @classmethod
    def efficient(cls, costs: np.ndarray, errors: np.ndarray) -> _Layer:
        """Drop options that another one beats in both cost and error."""
        order = np.lexsort((errors, costs))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
        order = order[errors[order] < best_before]
        return cls(costs[order], errors[order], order)

    def hull(self) -> list[int]:
        """Return the options on the lower convex hull, cheapest first."""
        hull: list[int] = []
        for k in range(self.costs.size):
            while len(hull) > 1 and self._gain(hull[-2], hull[-1]) <= self._gain(hull[-1], k):
                hull.pop()
            hull.append(k)
        return hull

    def _gain(self, i: int, j: int) -> float:
        """Return the reduction of error per unit of cost from option `i` to `j`."""
        return (self.errors[i] - self.errors[j]) / (self.costs[j] - self.costs[i])


def _relaxed(layers: Sequence[_Layer], capacity: int) -> tuple[float, list[int]]:
    """Return the Lagrange multiplier of the budget, and a selection within it.

    Steps along the hulls are taken in order of decreasing gain. The gain of the first step that
    does not fit solves the relaxation in which options may be mixed.
    """
    steps = [
        (layer._gain(i, j), number, i, j)
        for number, layer in enumerate(layers)
        for i, j in itertools.pairwise(layer.hull())
    ]
    steps.sort(key=lambda step: -step[0])
    picks = [0] * len(layers)
    left = capacity - sum(layer.costs[0] for layer in layers)
    slope = 0.0
    for gain, number, i, j in steps:
        step = layers[number].costs[j] - layers[number].costs[i]
        if picks[number] == i and step <= left:
            picks[number], left = j, left - step
        else:
            slope = slope or gain
    return slope, picks


class _Search:
    """Dynamic programming over layers, pruned by the relaxation.

    With the multiplier ``s``, a selection of error E has ``E ≥ base + Σ gaps``, where the gap of an
    option is its ``error + s · cost`` minus the minimum of its layer.
    """

    #: Lower bound on the error of selections dropped by the last search.
    open_bound: float

    def __init__(
        self, layers: Sequence[_Layer], capacity: int, slope: float, picks: Sequence[int]
    ) -> None:
        self.layers, self.capacity, self.slope = layers, capacity, slope
        self.best = list(picks)
        self.best_error = self._error(picks)
        penalized = [layer.errors + slope * layer.costs for layer in layers]
        self.gaps = [values - values.min() for values in penalized]
        self.base = math.fsum(values.min() for values in penalized) - slope * capacity

    def _error(self, picks: Sequence[int]) -> float:
        return math.fsum(layer.errors[k] for layer, k in zip(self.layers, picks, strict=True))

    def run(self, max_states: int) -> None:
        """Set `best` to the selection with the smallest error."""
        self.open_bound = math.inf
        # Reserve the smallest costs of all later layers.
        cost = np.asarray([sum(layer.costs[0] for layer in self.layers)], dtype=np.float64)
        gap = np.zeros(1)
        trail = []
        for number in range(len(self.layers)):
            cost, gap, parent, option = self._extended(number, cost, gap)
            kept = self._undominated(cost, gap, max_states)
            cost, gap = cost[kept], gap[kept]
            trail.append((parent[kept], option[kept]))
        # The error equals the gap up to a constant and the multiplier's share.
        if cost.size:
            picks = self._traced(trail, int(np.argmin(gap - self.slope * cost)))
            if (error := self._error(picks)) < self.best_error:
                self.best, self.best_error = picks, error

    def _extended(
        self, number: int, cost: np.ndarray, gap: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Extend partial selections by one layer, keeping those that may still be optimal."""
        layer, gaps = self.layers[number], self.gaps[number]
        costs = cost[:, None] + (layer.costs - layer.costs[0])
        sums = gap[:, None] + gaps
        promising = (costs <= self.capacity) & (self.base + sums < self.best_error)
        parent, option = np.nonzero(promising)
        return costs[promising], sums[promising], parent, option

    def _undominated(self, cost: np.ndarray, gap: np.ndarray, max_states: int) -> np.ndarray:
        """Return the Pareto-optimal states, at most `max_states`."""
        error = gap - self.slope * cost
        order = np.lexsort((error, cost))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], error[order]]))[:-1]
        order = order[error[order] < best_before]
        if order.size <= max_states:
            return order
        ranked = order[np.argsort(gap[order], kind="stable")]
        self.open_bound = min(self.open_bound, self.base + float(gap[ranked[max_states]]))
        return ranked[:max_states]

    def _traced(self, trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> list[int]:
        picks = []
        for parent, option in reversed(trail):
            picks.append(int(option[state]))
            state = int(parent[state])
        return picks[::-1]
