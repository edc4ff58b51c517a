"""Error of a selection of hidden units as a function of second moments."""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.calibration import OutputStatistics

#: Eigenvalues of a Gram matrix below this, relative to the largest, are rounding.
_RANK_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Selection:
    """Kept hidden units, in increasing order, with their output weights.

    `weights` has shape (n_neurons, n_outputs) and `error` is ``‖U − H_S W_S‖_F² / ‖U‖_F²``.
    """

    support: np.ndarray
    weights: Array
    error: float
    n_iter: int = 0


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """``‖U − H W‖_F²`` as a function of the nonzero rows of `W`.

    Parameters
    ----------
    gram : array of shape (n_hidden, n_hidden)
        ``HᵀH``.
    cross : array of shape (n_hidden, n_outputs)
        ``HᵀU``.
    energy : float
        ``‖U‖_F²``.
    unit : float, default=1.0
        Factor to multiply `W` by if `H` and `U` were scaled.
    width : int, default=1
        Columns of `H` per unit, such as the positions of a channel.
    """

    gram: Array
    cross: Array
    energy: float
    unit: float = 1.0
    width: int = 1

    @property
    def n_hidden(self) -> int:
        """Number of hidden units."""
        return int(self.gram.shape[0]) // self.width

    def columns(self, support: np.ndarray) -> np.ndarray:
        """Return the columns of the units in `support`."""
        return (support[:, None] * self.width + np.arange(self.width)).reshape(-1)

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Sum values over the columns of each unit."""
        return values.reshape(-1, self.width).sum(axis=1)

    def normalized(self) -> tuple[Self, Array]:
        """Return the problem with units of norm one, and their norms (1 for a dead unit)."""
        xp = backend.namespace(self.gram)
        norms = xp.sqrt(xp.linalg.diagonal(self.gram))
        norms = xp.where(norms > 0.0, norms, 1.0)
        gram = self.gram / norms[:, None] / norms[None, :]
        return dataclasses.replace(self, gram=gram, cross=self.cross / norms[:, None]), norms

    def on(self, support: np.ndarray) -> tuple[Array, Array]:
        """Return the rows and columns of `gram`, and the rows of `cross`, in `support`."""
        gram, cross = self.rows(support)
        index = backend.like(self.columns(support), gram)
        return backend.namespace(gram).take(gram, index, axis=1), cross

    def rows(self, support: np.ndarray) -> tuple[Array, Array]:
        """Return the rows of `gram` and of `cross` in `support`."""
        take = backend.namespace(self.gram).take
        index = backend.like(self.columns(support), self.gram)
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
        """Return the minimum-norm least-squares weights on `support`."""
        gram, cross = self.on(support)
        xp = backend.namespace(gram)
        eigenvalues, Q, sound = _spectrum(gram)
        inverse = xp.where(sound, 1.0 / xp.where(sound, eigenvalues, 1.0), 0.0)
        return xp.matmul(Q * inverse, xp.matmul(xp.matrix_transpose(Q), cross))

    def unseen(self, support: np.ndarray, weights: Array) -> Array:
        """Return the part of `weights` on `support` that has no effect on any sample of `H`."""
        gram, _ = self.on(support)
        xp = backend.namespace(gram)
        _, Q, sound = _spectrum(gram)
        idle = Q * xp.astype(~sound, Q.dtype)
        return xp.matmul(idle, xp.matmul(xp.matrix_transpose(Q), weights))


def _spectrum(gram: Array) -> tuple[Array, Array, Array]:
    """Return eigenvalues, eigenvectors, and a mask of those above rounding."""
    eigenvalues, Q = backend.namespace(gram).linalg.eigh(gram)
    return eigenvalues, Q, eigenvalues > eigenvalues[-1] * _RANK_TOLERANCE


def quadratic(statistics: OutputStatistics, width: int = 1) -> Quadratic:
    """Return the quadratic problem given by `statistics`.

    Activations and outputs are scaled by powers of two, so that squares of moments are finite.
    """
    gram, cross = statistics.inputs.gram, statistics.cross
    energies = (backend.max_abs(gram), statistics.energy)
    h, u = (2.0 ** (math.frexp(energy)[1] // 2) if energy else 1.0 for energy in energies)
    return Quadratic(gram / h / h, cross / h / u, statistics.energy / u / u, u / h, width)
