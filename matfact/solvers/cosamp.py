"""Selection of hidden units of a two-layer block, and their output weights.

The block computes ``U = H W`` from its activations `H`; a selection keeps some columns of `H`. Its
error is a quadratic function of `W`, determined by second moments of `H` and `U`, so these
functions do not need the activations themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.calibration import OutputStatistics
from matfact.solvers._callback import Callback
from matfact.solvers.exchange import Tableau, exchange, largest, shrink
from matfact.solvers.quadratic import Quadratic, Selection, quadratic

#: Gradient steps per iteration of `gradient` (`m` in Walia et al., Algorithm 1).
_GRADIENT_STEPS = 5
#: Relative difference below which the errors of two starting points agree.
_AGREEMENT = 1e-3


def least_squares(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
    width: int = 1,
) -> Selection:
    """Select units, solving for the weights in closed form in every iteration.

    CoSaMP (Walia et al., Algorithm 1) with three changes: gradient steps are replaced by their
    closed-form limit, units are ranked by their effect on the re-solved error, and fewer units are
    exchanged when an iteration does not help, down to one. It starts from no units and from all
    units. If these starts end in different local optima, or worse than the supports of the
    published procedures, it also starts from those. The best selection is returned; its error is
    never above that of `ispasp`.

    Parameters
    ----------
    statistics : OutputStatistics
        Statistics of the activations and outputs.
    n_neurons : int
        Units to keep, from 1 to all.
    max_iter : int, default=50
        Maximum number of iterations from each starting point.
    callback : callable, optional
        Called after each iteration with its number and the lowest error of the run.
    width : int, default=1
        Number of adjacent columns of the activations per unit.
    """
    return _Search(statistics, max_iter, callback, width).best(n_neurons)


def selection_path(
    statistics: OutputStatistics,
    sizes: Sequence[int],
    max_iter: int = 50,
    callback: Callback | None = None,
    width: int = 1,
) -> list[Selection]:
    """Return a selection of each size, started from neighbouring sizes.

    One pass from large to small sizes drops units, another in the opposite direction adds units,
    and the better selection of each size is returned. Errors never increase with the size.

    Parameters
    ----------
    statistics : OutputStatistics
        Statistics of the activations and outputs.
    sizes : sequence of int
        Units to keep, each from 1 to all.
    max_iter : int, default=50
        Maximum number of iterations for each size and direction.
    callback : callable, optional
        Called after each iteration with its number and the lowest error of the current run.
    width : int, default=1
        As for `least_squares`.

    Returns
    -------
    list of Selection
        Selections in the order of `sizes`.
    """
    search = _Search(statistics, max_iter, callback, width)
    found: dict[int, Tableau] = {}
    state = search.fit(np.arange(search.scaled.n_hidden))
    for size in sorted(set(sizes), reverse=True):
        state = found[size] = search.shrink(state, size)
    state = search.fit(np.zeros(0, dtype=np.int64))
    for size in sorted(found):
        state = search.grow(state, size)
        state = found[size] = min(found[size], state, key=lambda run: run.error)
    return [search.selection(found[size]) for size in sizes]


def smallest_selection(
    statistics: OutputStatistics,
    max_error: float,
    max_iter: int = 50,
    callback: Callback | None = None,
    width: int = 1,
) -> Selection:
    """Find the smallest selection with an error of at most `max_error`, by bisection.

    Parameters as in `least_squares`; `max_error` bounds ``‖U − H_S W_S‖_F² / ‖U‖_F²``.

    Raises
    ------
    ValueError
        If the error of all units together is above `max_error`.
    """
    search = _Search(statistics, max_iter, callback, width)
    best = search.selection(search.fit(np.arange(search.scaled.n_hidden)))
    if not best.error <= max_error:
        raise ValueError(
            f"max_error={max_error**0.5:g} is less than the error {best.error**0.5:.4g} "
            "of all hidden units."
        )
    too_few = 0
    while len(best.support) - too_few > 1:
        tried = search.best((len(best.support) + too_few) // 2)
        if tried.error <= max_error:
            best = tried
        else:
            too_few = len(tried.support)
    return dataclasses.replace(best, n_iter=search.n_iter)


class _Search:
    """Improves selections of one block and counts the iterations."""

    def __init__(
        self, statistics: OutputStatistics, max_iter: int, callback: Callback | None, width: int
    ) -> None:
        self.statistics, self.max_iter, self.callback = statistics, max_iter, callback
        self.scaled, self._norms = quadratic(statistics, width).normalized()
        self.n_iter = 0

    def fit(self, support: np.ndarray) -> Tableau:
        return Tableau.fit(self.scaled, support)

    def grow(self, state: Tableau, n_neurons: int) -> Tableau:
        """Add the most useful units and improve the selection."""
        newcomers = n_neurons - int(state.kept.sum())
        return self.improve(state.enter(state.entering(newcomers)), newcomers)

    def shrink(self, state: Tableau, n_neurons: int) -> Tableau:
        """Drop the least useful units and improve the selection."""
        return self.improve(shrink(state, n_neurons), max(1, n_neurons // 16))

    def improve(self, state: Tableau, newcomers: int) -> Tableau:
        """Exchange units, up to `newcomers` at first."""
        return exchange(state, newcomers, self.max_iter, self._report)

    def _report(self, error: float) -> None:
        self.n_iter += 1
        if self.callback is not None:
            self.callback(self.n_iter, error)

    def best(self, n_neurons: int) -> Selection:
        """Return the best selection of all starts."""
        runs = [
            self.grow(self.fit(np.zeros(0, dtype=np.int64)), n_neurons),
            self.shrink(self.fit(np.arange(self.scaled.n_hidden)), n_neurons),
        ]
        low, high = sorted(run.error for run in runs)
        agree = high <= low * (1.0 + _AGREEMENT) ** 2
        for published in (
            ispasp(self.statistics, n_neurons, self.max_iter, width=self.scaled.width),
            # Enough iterations to rank units.
            gradient(self.statistics, n_neurons, -(-self.max_iter // 5), width=self.scaled.width),
        ):
            state = self.fit(published.support)
            if not agree or state.error < low:
                runs.append(self.improve(state, n_neurons))
        return self.selection(min(runs, key=lambda run: run.error))

    def selection(self, state: Tableau) -> Selection:
        """Return the support with its least-squares weights, for the unscaled `H` and `U`."""
        support = state.support
        weights = self.scaled.least_squares(support)
        error = self.scaled.error(support, weights)
        norms = backend.namespace(weights).take(
            self._norms, backend.like(self.scaled.columns(support), self._norms), axis=0
        )
        weights = weights * self.scaled.unit / norms[:, None]
        return Selection(support, weights, error, self.n_iter)


def gradient(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
    width: int = 1,
) -> Selection:
    """Select units by Walia et al., Algorithm 1, with exact line searches.

    Unlike in the paper, the best iterate is returned. Parameters as in `least_squares`.
    """
    problem = quadratic(statistics, width)
    xp = backend.namespace(problem.gram)
    current = Selection(np.zeros(0, dtype=np.int64), problem.cross[:0, :], 1.0)
    best: Selection | None = None
    for n_iter in range(1, max_iter + 1):
        rows, _ = problem.rows(current.support)
        slope = xp.matmul(xp.matrix_transpose(rows), current.weights) - problem.cross
        importance = problem.by_unit(backend.to_numpy(xp.sum(slope**2, axis=1)))
        importance[current.support] = -1.0
        newcomers = min(n_neurons, problem.n_hidden - len(current.support))
        joined = np.concatenate([current.support, largest(importance, newcomers)])
        zeros = xp.zeros_like(slope)[: newcomers * width, :]
        weights = _descend(problem, joined, xp.concat([current.weights, zeros]), 1)
        sizes = problem.by_unit(backend.to_numpy(xp.sum(weights**2, axis=1)))
        kept = largest(sizes, n_neurons)
        kept = kept[np.argsort(joined[kept])]
        index = backend.like(problem.columns(kept), weights)
        support, weights = joined[kept], xp.take(weights, index, axis=0)
        weights = _descend(problem, support, weights, _GRADIENT_STEPS - 1)
        current = Selection(support, weights, problem.error(support, weights), n_iter)
        best = current if best is None or current.error < best.error else best
        if callback is not None:
            callback(n_iter, best.error)
    assert best is not None  # max_iter is at least 1
    return dataclasses.replace(best, weights=best.weights * problem.unit, n_iter=max_iter)


def _descend(problem: Quadratic, support: np.ndarray, weights: Array, steps: int) -> Array:
    """Take gradient steps with exact line search on the weights of `support`."""
    gram, cross = problem.on(support)
    xp = backend.namespace(gram)
    slope = xp.matmul(gram, weights) - cross
    for _ in range(steps):
        bend = xp.matmul(gram, slope)
        curvature = float(xp.sum(slope * bend))
        if curvature <= 0.0:
            break
        step = float(xp.sum(slope**2)) / curvature
        weights, slope = weights - step * slope, slope - step * bend
    return weights


def ispasp(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
    width: int = 1,
) -> Selection:
    """Select units by i-SpaSP (Wolfe & Kyrillidis 2021), with the dense weights.

    Units are ranked by signed sums over the batch, as published, which suits non-negative
    activations. Weights are those of the least-squares fit to `U` with all units. The best iterate
    is returned. Parameters as in `least_squares`.
    """
    problem = quadratic(statistics, width)
    xp = backend.namespace(problem.gram)
    scaled, norms = problem.normalized()
    dense = scaled.least_squares(np.arange(problem.n_hidden)) / norms[:, None]
    mean_input = backend.to_numpy(statistics.inputs.mean)
    activity = problem.by_unit(mean_input)
    by_output = backend.to_numpy(dense) * problem.unit
    mean_output = backend.to_numpy(statistics.mean)
    support = np.zeros(0, dtype=np.int64)
    best: Selection | None = None
    n_iter = 0
    while n_iter < max_iter:
        columns = problem.columns(support)
        residual = mean_output - mean_input[columns] @ by_output[columns]
        importance = problem.by_unit(by_output @ residual)
        joined = np.union1d(support, largest(importance, 2 * n_neurons))
        chosen = np.sort(joined[largest(activity[joined], n_neurons)])
        if np.array_equal(chosen, support):
            break  # a fixed point
        support, n_iter = chosen, n_iter + 1
        weights = xp.take(dense, backend.like(problem.columns(support), dense), axis=0)
        error = problem.error(support, weights)
        if best is None or error < best.error:
            best = Selection(support, weights, error)
        if callback is not None:
            callback(n_iter, best.error)
    assert best is not None  # max_iter is at least 1
    return dataclasses.replace(best, weights=best.weights * problem.unit, n_iter=n_iter)
