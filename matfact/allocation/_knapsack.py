"""One option for each layer, with the least total error that a budget allows.

The multiple-choice knapsack: a Lagrangian relaxation gives a selection and a bound on all others,
and a search over what the bound leaves open makes the selection the best there is. For 100 layers
of 30 options it proves that in a tenth of a second; HiGHS (``scipy.optimize.milp``), which finds
the same selection, may not have closed the gap after 30.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

#: Partial selections kept at a time by default: enough for a proof with hundreds of layers.
_MAX_STATES = 1 << 12
#: Kept in a first search, whose result rules out most of what the second would look at.
_FEW_STATES = 1 << 8


@dataclasses.dataclass(frozen=True)
class Selection:
    """What :func:`select` found.

    Attributes
    ----------
    choices : tuple of int
        Option of each layer.
    cost : float
        Total cost, at most the budget.
    error : float
        Total error.
    lower_bound : float
        No selection within the budget has less error; equal to `error` where that is proven to be
        the least.
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
    """Choose one option for each layer so that the total error is least within the budget.

    Parameters
    ----------
    costs, errors : sequence of sequences of float
        For each layer, the cost and the error of each of its options; not negative.
    budget : float
        Ceiling of the total cost.
    max_states : int, default=4096
        Partial selections kept in the search. Where there are more, the least promising are
        dropped, and ``lower_bound`` tells how much that may have lost.

    Returns
    -------
    Selection
        The best options, with the proof.

    Raises
    ------
    ValueError
        If the arguments are inconsistent or the cheapest options exceed the budget.

    References
    ----------
    .. [1] H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11.

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
        if least <= budget:  # but for rounding
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
    """Return the power of two in which costs are counted, rounded up.

    The budget has fewer than 2⁵³ of them, so that sums of counts are exact, and those of whole
    numbers are too.
    """
    if not budget > 0 or not math.isfinite(budget):
        raise ValueError(f"budget must be a positive number, got {budget!r}.")
    return 2.0 ** (math.frexp(budget)[1] - 53)


def _checked(
    costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], budget: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the arrays; what exceeds the budget alone costs the next number above it."""
    if len(costs) != len(errors):
        raise ValueError(
            f"costs and errors must be of equally many layers, got {len(costs)} and {len(errors)}."
        )
    pairs = []
    for i, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        c, e = np.asarray(cost, dtype=np.float64), np.asarray(error, dtype=np.float64)
        if c.ndim != 1 or c.shape != e.shape or not c.size:
            raise ValueError(
                f"costs and errors must hold as many numbers for layer {i}, at least 1."
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
        """Leave out options that another one beats in both."""
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
        """Return the error avoided per unit of cost by option `j` instead of `i`."""
        return (self.errors[i] - self.errors[j]) / (self.costs[j] - self.costs[i])


def _relaxed(layers: Sequence[_Layer], capacity: int) -> tuple[float, list[int]]:
    """Return the Lagrange multiplier of the budget, and a selection within it.

    Steps along the hulls are taken by decreasing gain. The gain of the first that does not fit
    solves the relaxation in which options may be mixed.
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
    """Dynamic programming over layers, without what the relaxation rules out.

    With the multiplier ``s``, a selection of error E and cost C has ``E ≥ base + Σ gaps``, where
    the gap of an option is its ``error + s · cost`` above the least of its layer.
    """

    #: No selection that the last search did not look at has less error.
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
        """Set `best` to the selection of least error."""
        self.open_bound = math.inf
        # The least costs of all layers to come are set aside.
        cost = np.asarray([sum(layer.costs[0] for layer in self.layers)], dtype=np.float64)
        gap = np.zeros(1)
        trail = []
        for number in range(len(self.layers)):
            cost, gap, parent, option = self._extended(number, cost, gap)
            kept = self._undominated(cost, gap, max_states)
            cost, gap = cost[kept], gap[kept]
            trail.append((parent[kept], option[kept]))
        # The error is the gap, but for a constant and the multiplier's share.
        if cost.size:
            picks = self._traced(trail, int(np.argmin(gap - self.slope * cost)))
            if (error := self._error(picks)) < self.best_error:
                self.best, self.best_error = picks, error

    def _extended(
        self, number: int, cost: np.ndarray, gap: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return all partial selections with one more layer that may still be the best."""
        layer, gaps = self.layers[number], self.gaps[number]
        costs = cost[:, None] + (layer.costs - layer.costs[0])
        sums = gap[:, None] + gaps
        promising = (costs <= self.capacity) & (self.base + sums < self.best_error)
        parent, option = np.nonzero(promising)
        return costs[promising], sums[promising], parent, option

    def _undominated(self, cost: np.ndarray, gap: np.ndarray, max_states: int) -> np.ndarray:
        """Return the states that no other beats in cost and in error, at most `max_states`."""
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
