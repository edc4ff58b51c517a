"""Fitting problem of one matrix of a layer: its target and the judgement of fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics, MapStatistics, OutputStatistics
from matfact.operators import FactorProduct
from matfact.solvers.finalize import input_scale
from matfact.solvers.layerwise import corrected, corrections
from matfact.torch.calibration._layer_statistics import Sums

#: Dampings of corrections for earlier layers, most cautious first; tried as long as the error on
#: held-out inputs falls.
CORRECTION_DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
#: Ratio of the errors on held-out and fitted inputs from which more damping is tried.
OVERFITTED = 1.1
_Outputs = OutputStatistics | MapStatistics


class Choice(NamedTuple):
    """A product, and an optional function that refits it to another target and inputs."""

    product: FactorProduct
    again: Callable[[Array, InputStatistics], FactorProduct] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Fitting problem of one matrix.

    Attributes
    ----------
    W : array
        The matrix.
    target : array
        The matrix, corrected for changes of its inputs.
    wanted : OutputStatistics, MapStatistics or None
        Inputs with the outputs of the dense network, centred if a bias corrects the means.
    damping : float or None
        Damping of the correction; infinite without correction, None without held-out batches.
    aside : OutputStatistics, MapStatistics or None
        The same for held-out batches, centred with the means of the other batches; None without
        held-out batches.
    unshifted : OutputStatistics, MapStatistics or None
        The held-out statistics without centring, if a bias might correct the means.
    means : tuple of array
        Mean input and mean output.
    """

    W: Array
    target: Array
    wanted: _Outputs | None = None
    damping: float | None = None
    aside: _Outputs | None = None
    unshifted: _Outputs | None = None
    means: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, W: Array, fitted: Sums | None, aside: Sums | None, shift: bool) -> Self:
        """Return the problem of a matrix with its statistics.

        Parameters
        ----------
        W : array of shape (rows, columns)
            The matrix.
        fitted, aside : InputStatistics, OutputStatistics or None
            Statistics of the fitted and of the held-out batches.
        shift : bool
            Whether a bias corrects means.
        """
        if fitted is None:
            return cls(W, W)
        wanted, means = _deviations(fitted, W, shift)
        judge = None if aside is None else _with_outputs(aside, W)
        unshifted = judge if shift else None
        if judge is not None and shift:
            judge = judge.centered(_with_outputs(fitted, W))  # type: ignore[arg-type]
        if judge is not None and not judge.energy:  # zero outputs cannot judge fits
            judge = None
        target, damping = _target(W, wanted, judge)
        return cls(W, target, wanted, damping, judge, unshifted, means)

    def of_all(self, sums: Sums, shift: bool) -> Self:
        """Return the problem for all batches, with the correction confirmed by held-out ones."""
        wanted, means = _deviations(sums, self.W, shift)
        target = self.W
        if isinstance(wanted, OutputStatistics) and self.damping != math.inf:
            target = corrected(self.W, wanted, damping=self.damping)
        return type(self)(self.W, target, wanted, self.damping, means=means)

    def lost_mean(self, W_hat: Array) -> Array:
        """Return the mean error of the outputs."""
        assert self.means is not None
        inputs, outputs = self.means
        return outputs - backend.wide(W_hat) @ inputs

    def is_shifted(self, W_hat: Array) -> bool:
        """Whether correcting means by a bias lowers the held-out error, if there is one."""
        if self.aside is None or self.unshifted is None:
            return True
        return self.aside.squared_error(W_hat) <= self.unshifted.squared_error(W_hat)

    def error_aside(self, W_hat: Array) -> tuple[float, float]:
        """Return the squared error on held-out inputs and the energy of the target."""
        if self.aside is None:
            return 0.0, 0.0
        judge = self.aside if self.is_shifted(W_hat) else self.unshifted
        assert judge is not None
        return judge.squared_error(W_hat), self.aside.energy

    def error_fitted(self, W_hat: Array) -> tuple[float, float]:
        """Return the squared error on fitted inputs and the energy of the target."""
        if self.wanted is None:
            return 0.0, 0.0
        return self.wanted.squared_error(W_hat), self.wanted.energy

    def improved(self, choice: Choice, others: Iterable[Choice]) -> Choice:
        """Return the last of `others` before the held-out error stops falling."""
        best, least = choice, self._error(self.aside, choice.product)
        for other in others:
            error = self._error(self.aside, other.product)
            if error >= least:
                break
            best, least = other, error
        return best

    def is_overfitted(self, product: FactorProduct) -> bool:
        """Whether held-out inputs suggest more damping."""
        if self.aside is None:
            return False
        return self._error(self.aside, product) > OVERFITTED * self._error(self.wanted, product)

    def _error(self, sums: _Outputs | None, product: FactorProduct) -> float:
        assert sums is not None
        W_hat = product.astype(self.W.dtype).toarray()
        return math.sqrt(sums.squared_error(W_hat) / sums.energy) if sums.energy else 0.0

    def scale(self, inputs: InputStatistics) -> Array:
        """Return the scale of columns before a fit, or None if held-out inputs do not confirm it.

        A fit spreads its error evenly over all entries. Divided by the scale, this error should be
        smaller on held-out inputs.
        """
        scale = input_scale(inputs.second_moment)
        if self.aside is None:
            return scale
        xp = backend.namespace(scale)
        energies = xp.sum(backend.wide(self.target) ** 2, axis=0)
        entering = xp.linalg.diagonal(self.aside.inputs.gram)
        scaled = float(xp.sum(scale**2 * energies)) * float(xp.sum(entering / scale**2))
        plain = float(xp.sum(energies)) * float(xp.sum(entering))
        return scale if scaled <= plain else xp.ones_like(scale)


def _with_outputs(sums: Sums, W: Array) -> _Outputs:
    """Return statistics with outputs, by default the outputs of `W`."""
    return sums if isinstance(sums, OutputStatistics) else MapStatistics(sums, W)


def _deviations(sums: Sums, W: Array, shift: bool) -> tuple[_Outputs, tuple[Array, Array]]:
    """Return the statistics, centred if a bias corrects the means, and the means."""
    wanted = _with_outputs(sums, W)
    means = wanted.inputs.mean, wanted.mean
    return wanted.centered() if shift else wanted, means


def _target(W: Array, wanted: _Outputs, aside: _Outputs | None) -> tuple[Array, float | None]:
    """Return `W` corrected for changes of its inputs, as far as held-out inputs confirm it."""
    if isinstance(wanted, MapStatistics):
        return W, None
    if aside is None:
        return corrected(W, wanted), None
    best, chosen, least = W, math.inf, aside.squared_error(W)
    found = corrections(W, wanted, CORRECTION_DAMPINGS)
    for target, damping in zip(found, CORRECTION_DAMPINGS, strict=True):
        error = aside.squared_error(target)
        if error >= least:
            break
        best, chosen, least = target, damping, error
    return best, chosen
