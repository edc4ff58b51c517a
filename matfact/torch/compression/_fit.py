"""Fits of a layer's matrices, with or without statistics of its inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sklearn.base import clone

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._scaled import fit_scaled
from matfact.factorizers._settings import has_bits
from matfact.operators import FactorProduct
from matfact.operators._encoding import stored_nbytes
from matfact.solvers.finalize import finalize, reselect
from matfact.solvers.layerwise import caution
from matfact.torch.calibration._layer_statistics import LayerStatistics, Sums
from matfact.torch.calibration.options import Adaptation
from matfact.torch.compression._problem import Choice, Problem

#: Dampings of refits, most cautious first; tried as long as the error on held-out inputs falls.
REFIT_DAMPINGS = (1.0, 0.2, 0.0)
#: Dampings for factorizers that use inputs themselves, boldest first.
CALIBRATION_DAMPINGS = (0.0, 0.3, 3.0)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Fitted products of a layer, one per group, and their errors.

    Attributes
    ----------
    products : list of FactorProduct
        One per matrix.
    relative_error, normalized_error : float
        Errors over all matrices.
    layer_error, fitted_layer_error : float or None
        Error of the layer's outputs on held-out inputs, measured before any refit to them, and on
        the inputs of the final fit. None if no such inputs lead to an output.
    seconds : float
        Wall time of the fits.
    shifts : list of array
        Mean errors of the outputs, one per matrix, if a bias can correct them.
    """

    products: list[FactorProduct]
    relative_error: float
    normalized_error: float
    layer_error: float | None
    fitted_layer_error: float | None
    seconds: float
    shifts: list[Array] = dataclasses.field(default_factory=list)

    def nbytes(self, itemsize: int) -> int:
        """Return the bytes in files, of `itemsize` for each floating-point value."""
        factors = [factor for product in self.products for factor in product]
        return sum(stored_nbytes(factor, itemsize) for factor in factors)


def fit_layer(
    factorizer: BaseFactorizer,
    matrices: list[Array],
    statistics: LayerStatistics | None,
    adapt: Adaptation = "finalize",
    *,
    shift: bool = False,
) -> Fitted:
    """Factorize the matrices of a layer and measure the result.

    Held-out batches choose between fits to the other batches and give the reported error. A
    factorizer that uses inputs is then refit to all batches, like in scikit-learn's searches.

    Parameters
    ----------
    factorizer : BaseFactorizer
        Estimator to fit to each matrix.
    matrices : list of array
        The matrices, all of the same shape.
    statistics : LayerStatistics or None
        Statistics of the inputs. With statistics of pairs, the matrices are first corrected for the
        changes of the inputs.
    adapt : {"finalize", "finalize_one", "scale", "none"}
        How inputs are used for factorizers that cannot use them themselves.
    shift : bool
        Whether a bias corrects the mean error of the outputs.
    """
    start = time.perf_counter()
    sums: Sequence[tuple[Sums | None, Sums | None]] = [(None, None)] * len(matrices)
    if statistics is not None and not statistics.is_empty:
        sums = statistics.by_matrix()
    parts = [
        _fit_matrix(factorizer, W, fitted, aside, adapt, shift)
        for W, (fitted, aside) in zip(matrices, sums, strict=True)
    ]
    seconds = time.perf_counter() - start
    xp = backend.namespace(*matrices)
    W, products = xp.concat(matrices), [part.product for part in parts]
    dense = [product.astype(W.dtype).toarray() for product in products]
    relative = metrics.relative_error(W, xp.concat(dense))
    nnz = sum(product.nnz for product in products)
    return Fitted(
        products,
        relative,
        metrics.normalized_error(W, relative, nnz),
        _layer_error(part.aside for part in parts),
        _layer_error(part.fitted for part in parts),
        seconds,
        [part.shift for part in parts if part.shift is not None],
    )


class _Part(NamedTuple):
    """A fitted matrix, its squared errors with the energies of the target, and its shift."""

    product: FactorProduct
    aside: tuple[float, float]
    fitted: tuple[float, float]
    shift: Array | None


def _fit_matrix(
    factorizer: BaseFactorizer,
    W: Array,
    fitted: Sums | None,
    aside: Sums | None,
    adapt: Adaptation,
    shift: bool,
) -> _Part:
    problem = Problem.of(W, fitted, aside, shift)
    product, again = _chosen(factorizer, problem, adapt)
    W_hat = product.astype(W.dtype).toarray()
    error_aside, is_shifted = problem.error_aside(W_hat), problem.is_shifted(W_hat)
    if problem.aside is not None and again is not None:
        sums: Any = fitted
        problem = problem.of_all(sums + aside, shift)
        assert problem.wanted is not None
        product = again(problem.target, problem.wanted.inputs)
        W_hat = product.astype(W.dtype).toarray()
    lost = None
    if shift and fitted is not None:
        lost = problem.lost_mean(W_hat)
        lost = lost if is_shifted else 0 * lost
    return _Part(product, error_aside, problem.error_fitted(W_hat), lost)


def _chosen(factorizer: BaseFactorizer, problem: Problem, adapt: Adaptation) -> Choice:
    """Return the fit chosen by held-out batches, if there are any."""
    # Fit clones and drop them at once, since estimators keep their results.
    if problem.wanted is not None and factorizer.uses_inputs:
        return _calibrated(factorizer, problem, problem.wanted.inputs)
    if problem.wanted is None or adapt == "none" or has_bits(factorizer):
        # Codes take up neither scales of columns nor a refit.
        return Choice(clone(factorizer).fit(problem.target).operator_)
    return _adapted(factorizer, problem, problem.wanted.inputs, adapt)


def _calibrated(factorizer: BaseFactorizer, problem: Problem, inputs: InputStatistics) -> Choice:
    """Return the fit of a factorizer that uses inputs, with more damping if needed."""

    def fit(target: Array, inputs: InputStatistics, damping: float) -> FactorProduct:
        damped = inputs.damped(damping) if damping else inputs
        return clone(factorizer).fit(target, calibration=damped).operator_

    def fits() -> Iterator[Choice]:
        for damping in CALIBRATION_DAMPINGS:
            again = functools.partial(fit, damping=damping)
            yield Choice(again(problem.target, inputs), again)
        yield Choice(clone(factorizer).fit(problem.W).operator_)

    found = fits()
    first = next(found)
    return problem.improved(first, found) if problem.is_overfitted(first.product) else first


def _adapted(
    factorizer: BaseFactorizer, problem: Problem, inputs: InputStatistics, adapt: Adaptation
) -> Choice:
    """Return the fit of a factorizer that does not use inputs.

    The factorizer is fitted to columns scaled by the size of their inputs, and its values are refit
    to the inputs (Boža & Macko 2025, Section 4.3). Unstructured supports are partly chosen again.
    """
    target = problem.target
    product = fit_scaled(clone(factorizer), target, problem.scale(inputs))[1]
    if adapt == "scale":
        return Choice(product)
    rule: Callable[..., FactorProduct] = finalize
    if adapt == "finalize_one":
        rule = functools.partial(finalize, n_factors=1)
    elif factorizer.has_free_support:
        rule = reselect

    if problem.aside is None:
        found = rule(product, target, inputs.gram, damping=caution(inputs))
        return Choice(found.rescaled(1.0))

    def refits() -> Iterator[Choice]:
        present = product
        for i, damping in enumerate(REFIT_DAMPINGS):
            near = {"n_rounds": 1, "is_near": i > 0} if rule is reselect else {}
            present = rule(present, target, inputs.gram, damping=damping, **near).rescaled(1.0)
            yield Choice(present)

    return problem.improved(Choice(product), refits())


def _layer_error(errors: Iterable[tuple[float, float]]) -> float | None:
    """Return the relative error of the outputs over all groups, or None without outputs."""
    error, total = map(math.fsum, zip(*errors, strict=True))
    return math.sqrt(error / total) if total else None
