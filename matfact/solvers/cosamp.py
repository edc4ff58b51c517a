"""Which hidden units of a two-layer block to keep, and the output weights that suit them.

The block computes ``U = H W`` from its activations `H`; a selection keeps some columns of `H`. Its
error is a quadratic of `W` that second moments of `H` and `U` determine, so that none of these
functions sees the activations themselves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.calibration import OutputStatistics
from matfact.solvers._callback import Callback

#: Gradient steps in each iteration of :func:`gradient` (the `m` of paper 003, Algorithm 1).
_GRADIENT_STEPS = 5
#: Eigenvalues of a Gram matrix below this, relative to the largest, are rounding.
_RANK_TOLERANCE = 1e-12
#: Added to the unit diagonal of a Gram matrix that is inverted to compare hidden units.
_RIDGE = 1e-10
#: An iteration that lowers the error by less, relatively, changes nothing.
_PROGRESS = 1e-9


@dataclasses.dataclass(frozen=True)
class Selection:
    """Hidden units kept, in increasing order, with their output weights.

    `weights` has shape (n_neurons, n_outputs) and `error` is ``‖U − H_S W_S‖_F² / ‖U‖_F²``.
    """

    support: np.ndarray
    weights: Array
    error: float
    n_iter: int = 0


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """``‖U − H W‖_F²`` as a function of the rows of `W` that are not zero.

    Parameters
    ----------
    gram : array of shape (n_hidden, n_hidden)
        ``HᵀH``.
    cross : array of shape (n_hidden, n_outputs)
        ``HᵀU``.
    energy : float
        ``‖U‖_F²``.
    unit : float, default=1.0
        What `W` is to be multiplied with where `H` and `U` were scaled.
    """

    gram: Array
    cross: Array
    energy: float
    unit: float = 1.0

    @property
    def n_hidden(self) -> int:
        """Number of hidden units."""
        return int(self.gram.shape[0])

    def normalized(self) -> tuple[Self, Array]:
        """Return the same for units of norm one, with their norms (1 for a dead unit)."""
        xp = backend.namespace(self.gram)
        norms = xp.sqrt(xp.linalg.diagonal(self.gram))
        norms = xp.where(norms > 0.0, norms, 1.0)
        gram = self.gram / norms[:, None] / norms[None, :]
        return dataclasses.replace(self, gram=gram, cross=self.cross / norms[:, None]), norms

    def on(self, support: np.ndarray) -> tuple[Array, Array]:
        """Return the rows and columns of `gram`, and the rows of `cross`, in `support`."""
        gram, cross = self.rows(support)
        return backend.namespace(gram).take(gram, backend.like(support, gram), axis=1), cross

    def rows(self, support: np.ndarray) -> tuple[Array, Array]:
        """Return the rows of `gram` and of `cross` in `support`."""
        take = backend.namespace(self.gram).take
        index = backend.like(support, self.gram)
        return take(self.gram, index, axis=0), take(self.cross, index, axis=0)

    def error(self, support: np.ndarray, weights: Array) -> float:
        """Return the error of `weights` on `support`, relative to ``‖U‖_F²``."""
        if self.energy == 0.0:
            return 0.0
        xp = backend.namespace(weights)
        gram, cross = self.on(support)
        gained = float(xp.sum(weights * (2.0 * cross - xp.matmul(gram, weights))))
        return max(0.0, 1.0 - gained / self.energy)

    def least_squares(self, support: np.ndarray) -> Array:
        """Return the weights on `support` of smallest error, and of smallest norm among those."""
        gram, cross = self.on(support)
        xp = backend.namespace(gram)
        eigenvalues, Q = xp.linalg.eigh(gram)
        sound = eigenvalues > eigenvalues[-1] * _RANK_TOLERANCE
        inverse = xp.where(sound, 1.0 / xp.where(sound, eigenvalues, 1.0), 0.0)
        return xp.matmul(Q * inverse, xp.matmul(xp.matrix_transpose(Q), cross))

    def fit(self, support: np.ndarray) -> tuple[Array, Array, float]:
        """Return the inverse Gram matrix of `support`, the weights it gives, and their error.

        Needs units of norm one. A slight ridge makes it cheaper and safer than
        :meth:`least_squares`, and hardly worse.
        """
        gram, cross = self.on(support)
        if not len(support):
            return gram, cross, 1.0
        xp = backend.namespace(gram)
        eye = xp.eye(len(support), dtype=gram.dtype, device=backend.device(gram))
        inverse = backend.spd_inverse(gram + _RIDGE * eye)
        weights = xp.matmul(inverse, cross)
        gained = float(xp.sum(weights * cross) + _RIDGE * xp.sum(weights**2))
        error = max(0.0, 1.0 - gained / self.energy) if self.energy else 0.0
        return inverse, weights, error

    def gains(self, support: np.ndarray, inverse: Array) -> np.ndarray:
        """Return how much each unit lowers the error when it joins `support`, weights re-solved.

        Needs units of norm one, and the inverse from :meth:`fit`. Units of `support` get −1.
        """
        xp = backend.namespace(self.gram)
        rows, cross = self.rows(support)
        projected = xp.matmul(inverse, rows)
        # Norm of what is new in each unit, no less than what the ridge makes of it.
        new = 1.0 - xp.sum(rows * projected, axis=0)
        new = xp.where(new > 10 * _RIDGE, new, 10 * _RIDGE)
        residual = self.cross - xp.matmul(xp.matrix_transpose(projected), cross)
        gains = backend.to_numpy(xp.sum(residual**2, axis=1) / new)
        gains[support] = -1.0
        return gains

    def costs(self, support: np.ndarray) -> np.ndarray:
        """Return how much the error grows when each unit leaves `support`, weights re-solved.

        Needs units of norm one.
        """
        xp = backend.namespace(self.gram)
        inverse, weights, _ = self.fit(support)
        return backend.to_numpy(xp.sum(weights**2, axis=1) / xp.linalg.diagonal(inverse))


def quadratic(statistics: OutputStatistics) -> Quadratic:
    """Return the error of a selection as `statistics` determine it.

    Powers of two bring activations and outputs to a scale at which squares of moments are finite.
    """
    gram, cross = statistics.inputs.gram, statistics.cross
    energies = (backend.max_abs(gram), statistics.energy)
    h, u = (2.0 ** (math.frexp(energy)[1] // 2) if energy else 1.0 for energy in energies)
    return Quadratic(gram / h / h, cross / h / u, statistics.energy / u / u, u / h)


def least_squares(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
) -> Selection:
    """Return a selection whose weights, in every iteration, are the best for their support.

    CoSaMP (paper 003, Algorithm 1) with its gradient steps replaced by the closed form they
    approach, units ranked by what they change in the re-solved error, and fewer newcomers as soon
    as an iteration does not pay: at the end one unit enters and one leaves. It starts from
    nothing, from what is left of everything, and from the supports of the published procedures,
    so that the error is at most theirs; different starts end in different local optima, and the
    best is returned.

    Parameters
    ----------
    statistics : OutputStatistics
        Of the activations and the outputs.
    n_neurons : int
        Units to keep, from 1 to all.
    max_iter : int, default=50
        Most iterations from each starting point.
    callback : callable, optional
        Called after each iteration with its number and the lowest error of the run.
    """
    scaled, norms = quadratic(statistics).normalized()
    starts = [
        np.zeros(0, dtype=np.int64),
        _eliminate(scaled, n_neurons),
        gradient(statistics, n_neurons, max_iter).support,
        ispasp(statistics, n_neurons, max_iter).support,
    ]
    runs: list[Selection] = []
    for start in starts:
        done = runs[-1].n_iter if runs else 0
        runs.append(_pursue(scaled, start, n_neurons, (done, done + max_iter), callback))
    best = dataclasses.replace(min(runs, key=lambda run: run.error), n_iter=runs[-1].n_iter)
    norms = backend.namespace(norms).take(norms, backend.like(best.support, norms))
    return dataclasses.replace(best, weights=best.weights * scaled.unit / norms[:, None])


def _pursue(
    scaled: Quadratic,
    support: np.ndarray,
    n_neurons: int,
    iterations: tuple[int, int],
    callback: Callback | None,
) -> Selection:
    """Improve a support until no exchange of one unit does, with iterations numbered so."""
    n_iter, last = iterations
    inverse, _, error = scaled.fit(support)
    gains = scaled.gains(support, inverse)
    newcomers = n_neurons
    while newcomers and n_iter < last:
        n_iter += 1
        joined = np.union1d(support, _largest(gains, newcomers))
        tried = np.sort(joined[_largest(scaled.costs(joined), n_neurons)])
        inverse, _, tried_error = scaled.fit(tried)
        # From nothing, any full support is progress.
        if len(support) < n_neurons or tried_error < error * (1.0 - _PROGRESS):
            support, error = tried, tried_error
            gains = scaled.gains(support, inverse)
        else:
            newcomers //= 2
        if callback is not None:
            callback(n_iter, error)
    weights = scaled.least_squares(support)
    return Selection(support, weights, scaled.error(support, weights), n_iter)


def _eliminate(scaled: Quadratic, n_neurons: int) -> np.ndarray:
    """Return what is left when the units that cost least leave, a quarter of the excess a time."""
    support = np.arange(scaled.n_hidden)
    while len(support) > n_neurons:
        leaving = max(1, (len(support) - n_neurons) // 4)
        support = support[_largest(scaled.costs(support), len(support) - leaving)]
    return support


def gradient(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
) -> Selection:
    """Return the selection of paper 003, Algorithm 1, with exact line searches.

    The best iterate is returned, which the paper does not ask for. Parameters as for
    :func:`least_squares`.
    """
    problem = quadratic(statistics)
    xp = backend.namespace(problem.gram)
    current = Selection(np.zeros(0, dtype=np.int64), problem.cross[:0, :], 1.0)
    best: Selection | None = None
    for n_iter in range(1, max_iter + 1):
        rows, _ = problem.rows(current.support)
        slope = xp.matmul(xp.matrix_transpose(rows), current.weights) - problem.cross
        importance = backend.to_numpy(xp.sum(slope**2, axis=1))
        importance[current.support] = -1.0
        newcomers = min(n_neurons, problem.n_hidden - len(current.support))
        joined = np.concatenate([current.support, _largest(importance, newcomers)])
        zeros = xp.zeros_like(slope)[:newcomers, :]
        weights = _descend(problem, joined, xp.concat([current.weights, zeros]), 1)
        kept = _largest(backend.to_numpy(xp.sum(weights**2, axis=1)), n_neurons)
        kept = kept[np.argsort(joined[kept])]
        support, weights = joined[kept], xp.take(weights, backend.like(kept, weights), axis=0)
        weights = _descend(problem, support, weights, _GRADIENT_STEPS - 1)
        current = Selection(support, weights, problem.error(support, weights), n_iter)
        best = current if best is None or current.error < best.error else best
        if callback is not None:
            callback(n_iter, best.error)
    assert best is not None  # max_iter is at least 1
    return dataclasses.replace(best, weights=best.weights * problem.unit, n_iter=max_iter)


def _descend(problem: Quadratic, support: np.ndarray, weights: Array, steps: int) -> Array:
    """Take gradient steps on the weights of `support`, each to the lowest point of its line."""
    gram, cross = problem.on(support)
    xp = backend.namespace(gram)
    for _ in range(steps):
        slope = xp.matmul(gram, weights) - cross
        curvature = float(xp.sum(slope * xp.matmul(gram, slope)))
        if curvature <= 0.0:
            break
        weights = weights - (float(xp.sum(slope**2)) / curvature) * slope
    return weights


def ispasp(
    statistics: OutputStatistics,
    n_neurons: int,
    max_iter: int = 50,
    callback: Callback | None = None,
) -> Selection:
    """Return the selection of i-SpaSP (Wolfe & Kyrillidis 2021), with the dense weights.

    Units are ranked by sums over the batch, signed as published, which suits activations that
    are not negative; weights are those that fit `U` best when no unit is dropped. The best
    iterate is returned. Parameters as for :func:`least_squares`.
    """
    problem = quadratic(statistics)
    xp = backend.namespace(problem.gram)
    scaled, norms = problem.normalized()
    dense = scaled.least_squares(np.arange(problem.n_hidden)) / norms[:, None]
    activity = backend.to_numpy(statistics.inputs.mean)
    by_output = backend.to_numpy(dense) * problem.unit
    mean_output = backend.to_numpy(statistics.mean)
    support = np.zeros(0, dtype=np.int64)
    best: Selection | None = None
    for n_iter in range(1, max_iter + 1):
        residual = mean_output - activity[support] @ by_output[support]
        joined = np.union1d(support, _largest(by_output @ residual, 2 * n_neurons))
        support = np.sort(joined[_largest(activity[joined], n_neurons)])
        weights = xp.take(dense, backend.like(support, dense), axis=0)
        error = problem.error(support, weights)
        if best is None or error < best.error:
            best = Selection(support, weights, error)
        if callback is not None:
            callback(n_iter, best.error)
    assert best is not None  # max_iter is at least 1
    return dataclasses.replace(best, weights=best.weights * problem.unit, n_iter=max_iter)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the `k` largest values, of the first among equals."""
    return np.argsort(-values, kind="stable")[:k]
