"""Fit one matrix of a layer, with or without statistics of its inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from sklearn.base import clone

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics, MapStatistics, OutputStatistics
from matfact.factorizers import BaseFactorizer, DoubleSparseFactorizer
from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize, input_scale, reselect, scaled_columns
from matfact.solvers.layerwise import caution, corrected, corrections
from matfact.torch._statistics import LayerStatistics, Sums

#: How inputs count for factorizers that cannot use them: not at all; in the scale of columns
#: before the fit; and also in a refit of values after it, of one factor or of all.
Adaptation = Literal["none", "scale", "finalize_one", "finalize"]

#: Dampings of corrections for former layers, and of refits, that are tried as long as the error on
#: inputs kept aside becomes less, the most cautious first.
CORRECTION_DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
REFIT_DAMPINGS = (1.0, 0.3, 0.1, 0.03, 0.0)
#: Dampings for factorizers that use inputs themselves, the boldest first.
CALIBRATION_DAMPINGS = (0.0, 0.3, 3.0)
#: Their error on inputs kept aside, relative to that on those fitted, from which they are tried.
OVERFITTED = 1.1
_Outputs = OutputStatistics | MapStatistics


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The products of a layer, one a group, and how near they come.

    Attributes
    ----------
    products : list of FactorProduct
        One for each matrix.
    relative_error, normalized_error : float
        Of all matrices together.
    layer_error, fitted_layer_error : float or None
        Error on the layer's outputs, for inputs that were kept aside and for those fitted, as far
        as there are any that make an output.
    seconds : float
        Wall time of the fits.
    shifts : list of array
        Means of what outputs have lost, one for each matrix, where a bias can make up for them.
    """

    products: list[FactorProduct]
    relative_error: float
    normalized_error: float
    layer_error: float | None
    fitted_layer_error: float | None
    seconds: float
    shifts: list[Array] = dataclasses.field(default_factory=list)

    def nbytes(self, itemsize: int) -> int:
        """Return the bytes of values of `itemsize` bytes each and of their positions."""
        factors = [factor for product in self.products for factor in product]
        return sum(itemsize * f.nnz + f.index_nbytes("smallest") for f in factors)


def fit_layer(
    factorizer: BaseFactorizer,
    matrices: list[Array],
    statistics: LayerStatistics | None,
    adapt: Adaptation = "finalize",
    *,
    shift: bool = False,
) -> Fitted:
    """Factorize the matrices of a layer and measure the result.

    Parameters
    ----------
    factorizer : BaseFactorizer
        Fitted to each matrix in turn.
    matrices : list of array
        The matrices, of one shape.
    statistics : LayerStatistics or None
        Those of the inputs. Where they are those of pairs, the matrices are corrected for what has
        become of the inputs.
    adapt : {"finalize", "finalize_one", "scale", "none"}
        What makes factorizers that cannot use the inputs themselves take them into account.
    shift : bool
        Whether a bias makes up for the mean of what outputs lose.
    """
    start = time.perf_counter()
    if statistics is None or statistics.is_empty:
        sums: Sequence[tuple[Sums | None, Sums | None]] = [(None, None)] * len(matrices)
    else:
        sums = statistics.by_matrix()
    problems = [_Problem.of(W, *each, shift) for W, each in zip(matrices, sums, strict=True)]
    products = [_fit(factorizer, problem, adapt) for problem in problems]
    seconds = time.perf_counter() - start
    xp = backend.namespace(*matrices)
    W = xp.concat(matrices)
    dense = [product.astype(W.dtype).toarray() for product in products]
    relative = metrics.relative_error(W, xp.concat(dense))
    nnz = sum(product.nnz for product in products)
    return Fitted(
        products,
        relative,
        metrics.normalized_error(W, relative, nnz),
        _layer_error(p.error_aside(W_hat) for p, W_hat in zip(problems, dense, strict=True)),
        _layer_error(p.error_fitted(W_hat) for p, W_hat in zip(problems, dense, strict=True)),
        seconds,
        [problem.shift(W_hat) for problem, W_hat in zip(problems, dense, strict=True)]
        if shift and problems[0].wanted is not None
        else [],
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What one matrix of a layer is fitted to.

    Attributes
    ----------
    W : array
        The matrix.
    target : array
        The matrix, corrected for what has become of its inputs.
    wanted : OutputStatistics, MapStatistics or None
        Inputs with the outputs of the dense network, without their means where a bias makes up for
        those.
    aside : OutputStatistics, MapStatistics or None
        The same for the batches kept aside, less the means of the others; None where there are
        none.
    unshifted : OutputStatistics, MapStatistics or None
        Those kept aside with their means, where a bias might make up for them.
    means : tuple of array
        Mean input and mean output.
    """

    W: Array
    target: Array
    wanted: _Outputs | None = None
    aside: _Outputs | None = None
    unshifted: _Outputs | None = None
    means: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, W: Array, fitted: Sums | None, aside: Sums | None, shift: bool) -> _Problem:
        if fitted is None:
            return cls(W, W)
        wanted = _with_outputs(fitted, W)
        judge = None if aside is None else _with_outputs(aside, W)
        means, unshifted = (wanted.inputs.mean, wanted.mean), None
        if shift:
            unshifted = judge
            judge = judge and judge.centered(wanted)  # type: ignore[arg-type]  # of the same kind
            wanted = wanted.centered()
        if judge is not None and not judge.energy:  # nothing can be told from zeros
            judge = None
        return cls(W, _target(W, wanted, judge), wanted, judge, unshifted, means)

    def shift(self, W_hat: Array) -> Array:
        """Return the mean of what outputs have lost, zero where others lose something else."""
        assert self.means is not None
        inputs, outputs = self.means
        lost = outputs - backend.wide(W_hat) @ inputs
        return lost if self._is_shifted(W_hat) else 0 * lost

    def _is_shifted(self, W_hat: Array) -> bool:
        """Whether a bias that makes up for means lowers the error on inputs kept aside, if any."""
        if self.aside is None or self.unshifted is None:
            return True
        return self.aside.squared_error(W_hat) <= self.unshifted.squared_error(W_hat)

    def error_aside(self, W_hat: Array) -> tuple[float, float]:
        """Return the squared error on inputs kept aside, and the energy of what is wanted."""
        if self.aside is None:
            return 0.0, 0.0
        judge = self.aside if self._is_shifted(W_hat) else self.unshifted
        assert judge is not None
        return judge.squared_error(W_hat), self.aside.energy

    def error_fitted(self, W_hat: Array) -> tuple[float, float]:
        """Return the same on the inputs fitted."""
        return (
            (0.0, 0.0)
            if self.wanted is None
            else (self.wanted.squared_error(W_hat), self.wanted.energy)
        )

    def improved(self, product: FactorProduct, others: Iterable[FactorProduct]) -> FactorProduct:
        """Return the last of `others` up to which each lowers the error on inputs kept aside."""
        best, least = product, self._error(self.aside, product)
        for other in others:
            error = self._error(self.aside, other)
            if error >= least:
                break
            best, least = other, error
        return best

    def is_overfitted(self, product: FactorProduct) -> bool:
        """Whether inputs kept aside tell that more caution may pay."""
        if self.aside is None:
            return False
        return self._error(self.aside, product) > OVERFITTED * self._error(self.wanted, product)

    def _error(self, sums: _Outputs | None, product: FactorProduct) -> float:
        assert sums is not None
        W_hat = product.astype(self.W.dtype).toarray()
        return math.sqrt(sums.squared_error(W_hat) / sums.energy) if sums.energy else 0.0

    def scale(self, inputs: InputStatistics) -> Array:
        """Return what columns are multiplied by before a fit, nothing if that does not hold up.

        A fit spreads its error over all entries alike; divided by the scale and multiplied by the
        inputs kept aside, it should become less.
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
    """Return the sums of inputs with those of outputs, which `W` makes of them if nothing else."""
    return sums if isinstance(sums, OutputStatistics) else MapStatistics(sums, W)


def _target(W: Array, wanted: _Outputs, aside: _Outputs | None) -> Array:
    """Return `W` corrected for what has become of its inputs, as far as others bear it out."""
    if isinstance(wanted, MapStatistics):
        return W
    if aside is None:
        return corrected(W, wanted)
    best, least = W, aside.squared_error(W)
    for target in corrections(W, wanted, CORRECTION_DAMPINGS):
        error = aside.squared_error(target)
        if error >= least:
            break
        best, least = target, error
    return best


def _fit(factorizer: BaseFactorizer, problem: _Problem, adapt: Adaptation) -> FactorProduct:
    """Return the fitted product."""
    # Copies are fitted, and forgotten at once, since factorizers keep what they have found.
    if problem.wanted is not None and uses_inputs(factorizer):
        return _calibrated(factorizer, problem, problem.wanted.inputs)
    if problem.wanted is None or adapt == "none":
        return clone(factorizer).fit(problem.target).operator_
    return _adapted(factorizer, problem, problem.wanted.inputs, adapt).rescaled(1.0)


def _calibrated(
    factorizer: BaseFactorizer, problem: _Problem, inputs: InputStatistics
) -> FactorProduct:
    """Return the fit of a factorizer that uses inputs, with more caution where it has to be."""

    def fits() -> Iterator[FactorProduct]:
        for damping in CALIBRATION_DAMPINGS:
            damped = inputs.damped(damping) if damping else inputs
            yield clone(factorizer).fit(problem.target, calibration=damped).operator_
        yield clone(factorizer).fit(problem.W).operator_

    found = fits()
    first = next(found)
    return problem.improved(first, found) if problem.is_overfitted(first) else first


def _adapted(
    factorizer: BaseFactorizer, problem: _Problem, inputs: InputStatistics, adapt: Adaptation
) -> FactorProduct:
    """Return the fit of a factorizer that cannot use inputs.

    It is fitted to columns scaled by what enters them, and its values are refitted to the inputs
    (paper 001, Section 4.3); where entries may be stored anywhere, some are chosen anew.
    """
    W, xp = problem.target, backend.namespace(problem.target)
    scale = xp.astype(problem.scale(inputs), W.dtype)
    scaled = W * scale[None, :]
    unit = backend.unit(scaled)
    scaled *= 1 / unit  # in place, so that the factorizer makes no copy of its own
    product = scaled_columns(clone(factorizer).fit(scaled).operator_, unit / scale)
    del scaled
    if adapt == "scale":
        return product
    refit: Callable[..., FactorProduct] = finalize
    if adapt == "finalize_one":
        refit = functools.partial(finalize, n_factors=1)
    elif isinstance(factorizer, DoubleSparseFactorizer) and factorizer.constraints is None:
        refit = reselect
    if problem.aside is None:
        return refit(product, W, inputs.gram, damping=caution(inputs))
    if refit is reselect:
        refit = functools.partial(reselect, n_rounds=1)

    def refits() -> Iterator[FactorProduct]:
        present = product
        for damping in REFIT_DAMPINGS:
            present = refit(present, W, inputs.gram, damping=damping)
            yield present

    return problem.improved(product, refits())


def uses_inputs(factorizer: BaseFactorizer) -> bool:
    """Whether `factorizer` takes calibration inputs itself."""
    return type(factorizer)._factorize_calibrated is not BaseFactorizer._factorize_calibrated


def _layer_error(errors: Iterable[tuple[float, float]]) -> float | None:
    """Return the relative error of the outputs of all groups together, None if there are none."""
    error, total = map(math.fsum, zip(*errors, strict=True))
    return math.sqrt(error / total) if total else None
