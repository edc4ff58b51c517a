"""Fit one matrix of a layer, with or without statistics of its inputs."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Literal

from sklearn.base import clone

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.factorizers import BaseFactorizer, DoubleSparseFactorizer
from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize, input_scale, reselect, scaled_columns
from matfact.solvers.layerwise import corrected
from matfact.torch._matrices import LayerStatistics

#: How inputs count for factorizers that cannot use them: not at all; in the scale of columns
#: before the fit; and also in a refit of values after it, of one factor or of all.
Adaptation = Literal["none", "scale", "finalize_one", "finalize"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The products of a layer, one a group, and how near they come.

    Attributes
    ----------
    products : list of FactorProduct
        One for each matrix.
    relative_error, normalized_error : float
        Of all matrices together.
    layer_error : float or None
        Error on the layer's outputs, where statistics of its inputs were given.
    seconds : float
        Wall time of the fits.
    shifts : list of array
        Means of what outputs have lost, one for each matrix, where a bias can make up for them.
    """

    products: list[FactorProduct]
    relative_error: float
    normalized_error: float
    layer_error: float | None
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
    statistics : list of InputStatistics or OutputStatistics, or None
        Those of the inputs of each. Where they are those of pairs, the matrices are corrected for
        what has become of the inputs.
    adapt : {"finalize", "finalize_one", "scale", "none"}
        What makes factorizers that cannot use the inputs themselves take them into account.
    shift : bool
        Whether a bias makes up for the mean of what outputs lose.
    """
    start = time.perf_counter()
    problems = [
        _Problem.of(W, None if statistics is None else statistics[i], shift)
        for i, W in enumerate(matrices)
    ]
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
        None if statistics is None else _layer_error(problems, dense),
        seconds,
        [p.shift(W, W_hat) for p, W, W_hat in zip(problems, matrices, dense, strict=True)]
        if shift and statistics is not None
        else [],
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What one matrix of a layer is fitted to.

    Attributes
    ----------
    target : array
        The matrix, corrected for what has become of its inputs.
    inputs : InputStatistics or None
        Those of its inputs, without their mean where a bias makes up for it.
    means : tuple of array
        Mean input in the dense network and now.
    """

    target: Array
    inputs: InputStatistics | None
    means: tuple[Array, Array] | None = None

    @classmethod
    def of(
        cls, W: Array, statistics: InputStatistics | OutputStatistics | None, shift: bool
    ) -> _Problem:
        if statistics is None:
            return cls(W, None)
        if isinstance(statistics, InputStatistics):
            alone = statistics.centered() if shift else statistics
            return cls(W, alone, (statistics.mean, statistics.mean))
        paired = statistics.centered() if shift else statistics
        means = statistics.mean, statistics.inputs.mean
        return cls(corrected(W, paired), paired.inputs, means)

    def shift(self, W: Array, W_hat: Array) -> Array:
        """Return the mean of what outputs have lost."""
        assert self.means is not None
        dense, now = self.means
        return backend.wide(W) @ dense - backend.wide(W_hat) @ now


def _fit(factorizer: BaseFactorizer, problem: _Problem, adapt: Adaptation) -> FactorProduct:
    """Return the fitted product.

    Factorizers that cannot use the inputs are fitted to columns scaled by what enters them, and
    their values refitted to the inputs (paper 001, Section 4.3); where entries may be stored
    anywhere, some are chosen anew.
    """
    W, inputs = problem.target, problem.inputs
    # Copies are fitted, and forgotten at once, since factorizers keep what they have found.
    if inputs is not None and uses_inputs(factorizer):
        return clone(factorizer).fit(W, calibration=inputs).operator_
    if inputs is None or adapt == "none":
        return clone(factorizer).fit(W).operator_
    xp = backend.namespace(W)
    scale = xp.astype(input_scale(inputs.second_moment), W.dtype)
    scaled = W * scale[None, :]
    unit = backend.unit(scaled)
    scaled *= 1 / unit  # in place, so that the factorizer makes no copy of its own
    product = scaled_columns(clone(factorizer).fit(scaled).operator_, unit / scale)
    del scaled
    if adapt == "scale":
        return product.rescaled(1.0)
    if adapt == "finalize_one":
        return finalize(product, W, inputs.gram, n_factors=1).rescaled(1.0)
    anywhere = isinstance(factorizer, DoubleSparseFactorizer) and factorizer.constraints is None
    refit = reselect if anywhere else finalize
    return refit(product, W, inputs.gram).rescaled(1.0)


def uses_inputs(factorizer: BaseFactorizer) -> bool:
    """Whether `factorizer` takes calibration inputs itself."""
    return type(factorizer)._factorize_calibrated is not BaseFactorizer._factorize_calibrated


def _layer_error(problems: list[_Problem], dense: list[Array]) -> float:
    """Return the relative error of the outputs of all groups together."""
    error = total = 0.0
    for problem, W_hat in zip(problems, dense, strict=True):
        assert problem.inputs is not None
        gram = problem.inputs.gram
        relative = metrics.layer_error(problem.target, W_hat, gram)
        energy = metrics.output_energy(problem.target, gram)
        total += energy
        error += energy * relative**2
    return math.sqrt(error / total) if total else 0.0
