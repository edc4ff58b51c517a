"""Exchange of hidden units in a selection, re-solving for the weights at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.solvers.quadratic import Quadratic

#: Added to the unit diagonal of Gram matrices, so that duplicate units are not singular.
_RIDGE = 1e-10
#: Updates of inverse Gram matrices with a larger diagonal lose too many digits.
_ILL_CONDITIONED = 1e5
#: Minimum relative improvement of an exchange.
_PROGRESS = 1e-9
#: Share of the excess units dropped at a time when a selection shrinks.
_STRIDE = 8


@dataclasses.dataclass(frozen=True)
class Tableau:
    """Least-squares fit on a support, as a table updated by the sweep operator (Goodnight 1979).

    With `G` the Gram matrix of units of norm one, `C` their cross moments, and `S` the support, the
    rows of `S` hold ``[−G_SS⁻¹, G_SS⁻¹ G_SN, W_S]``. The other rows hold the part not explained by
    `S`, ``[·, G_NN − G_NS G_SS⁻¹ G_SN, C_N − G_NS W_S]``. Moving `k` units takes one product with
    `k` columns.

    Parameters
    ----------
    problem : Quadratic
        Problem with units of norm one.
    kept : ndarray of bool of shape (n_hidden,)
        The support.
    table : array of shape (n_columns, n_columns + n_outputs)
        The rows above, one per column of a unit.
    """

    problem: Quadratic
    kept: np.ndarray
    table: Array

    @classmethod
    def fit(cls, problem: Quadratic, support: np.ndarray) -> Self:
        """Sweep the whole support at once."""
        xp = backend.namespace(problem.gram)
        gram = backend.add_diagonal(problem.gram, _RIDGE)
        kept = np.zeros(problem.n_hidden, dtype=bool)
        empty = cls(problem, kept, xp.concat([gram, problem.cross], axis=1))
        return empty._pivot(support, 1.0)

    @property
    def support(self) -> np.ndarray:
        """Units kept, in increasing order."""
        return np.flatnonzero(self.kept)

    @property
    def error(self) -> float:
        """Squared error relative to that without units."""
        energy = self.problem.energy
        xp = backend.namespace(self.table)
        index = backend.like(self.problem.columns(self.support), self.table)
        weights = xp.take(self.table, index, axis=0)[:, self._n_columns :]
        _, cross = self.problem.rows(self.support)
        gained = float(xp.sum(weights * cross) + _RIDGE * xp.sum(weights**2))
        return max(0.0, 1.0 - gained / energy) if energy else 0.0

    @property
    def _n_columns(self) -> int:
        return self.problem.gram.shape[0]

    def _ill_conditioned(self) -> bool:
        xp = backend.namespace(self.table)
        diagonal = backend.to_numpy(xp.linalg.diagonal(self.table[:, : self._n_columns]))
        of_kept = diagonal[self.problem.columns(self.support)]
        return bool(np.any(of_kept < -_ILL_CONDITIONED))

    def changes(self) -> np.ndarray:
        """Return the change of the error if each unit enters or leaves."""
        xp = backend.namespace(self.table)
        n_hidden, width = self.problem.n_hidden, self.problem.width
        square = self.table[:, : self._n_columns]
        square = xp.reshape(square, (n_hidden, width, n_hidden, width))
        own = backend.to_numpy(xp.linalg.diagonal(xp.permute_dims(square, (1, 3, 0, 2))))
        own = np.moveaxis(own, -1, 0) * np.where(self.kept, -1.0, 1.0)[:, None, None]
        # The unexplained part of a unit is at least the ridge.
        own = own + np.where(self.kept, 0.0, 10 * _RIDGE)[:, None, None] * np.eye(width)
        rows = xp.reshape(self.table[:, self._n_columns :], (n_hidden, width, -1))
        products = backend.to_numpy(xp.matmul(rows, xp.matrix_transpose(rows)))
        return np.einsum("iab,iab->i", np.linalg.inv(own), products)

    def entering(self, count: int) -> np.ndarray:
        """Return the units outside the support that reduce the error most, each by itself."""
        return largest(np.where(self.kept, -1.0, self.changes()), min(count, (~self.kept).sum()))

    def leaving(self, count: int) -> np.ndarray:
        """Return the units of the support whose loss raises the error least, each by itself."""
        return largest(np.where(self.kept, -self.changes(), -np.inf), count)

    def enter(self, units: np.ndarray) -> Self:
        """Return the fit with `units` added."""
        return self._moved(units, 1.0)

    def leave(self, units: np.ndarray) -> Self:
        """Return the fit without `units`."""
        return self._moved(units, -1.0)

    def _moved(self, units: np.ndarray, sign: float) -> Self:
        if self._ill_conditioned():
            kept = self.kept.copy()
            kept[units] = sign > 0
            return self.fit(self.problem, np.flatnonzero(kept))
        return self._pivot(units, sign)

    def _pivot(self, units: np.ndarray, sign: float) -> Self:
        """Sweep `units` (`sign` 1) or undo it (−1)."""
        if not len(units):
            return self
        table, n_columns = self.table, self._n_columns
        xp = backend.namespace(table)
        columns = self.problem.columns(units)
        moved = np.zeros((len(columns), table.shape[1]))
        moved[np.arange(len(columns)), columns] = sign
        rows = xp.take(table, backend.like(columns, table), axis=0)
        pivots = xp.take(rows[:, :n_columns], backend.like(columns, table), axis=1)
        inverse = sign * backend.spd_inverse(sign * pivots)
        # This is also right in the rows and columns of the pivots.
        rows = rows - backend.like(moved, table)
        update = xp.matmul(inverse, rows)
        table = table - xp.matmul(xp.matrix_transpose(rows[:, :n_columns]), update)
        corner = np.zeros(n_columns)
        corner[columns] = -2.0 * sign
        square = backend.add_diagonal(table[:, :n_columns], backend.like(corner, table))
        table = xp.concat([square, table[:, n_columns:]], axis=1)
        kept = self.kept.copy()
        kept[units] = sign > 0
        return dataclasses.replace(self, kept=kept, table=table)


def shrink(state: Tableau, n_neurons: int) -> Tableau:
    """Drop the least useful units, an eighth of the excess at a time."""
    while (excess := int(state.kept.sum()) - n_neurons) > 0:
        state = state.leave(state.leaving(max(1, excess // _STRIDE)))
    return state


def exchange(
    state: Tableau, newcomers: int, max_iter: int, report: Callable[[float], None]
) -> Tableau:
    """Improve a support until no exchange of a single unit helps.

    As in CoSaMP, units join, the weights are re-solved, and as many units leave. When that does
    not help, the number of joining units is halved.
    """
    error = state.error
    for _ in range(max_iter):
        if not newcomers:
            break
        joined = state.enter(state.entering(newcomers))
        tried = joined.leave(joined.leaving(int(joined.kept.sum() - state.kept.sum())))
        tried_error = tried.error
        if tried_error < error * (1.0 - _PROGRESS):
            state, error = tried, tried_error
        else:
            newcomers //= 2
        report(error)
    return state


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the `k` largest values; ties go to the first."""
    return np.argsort(-values, kind="stable")[:k]
