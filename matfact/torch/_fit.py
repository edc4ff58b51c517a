"""Fit one matrix of a layer, with or without statistics of its inputs."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Literal

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers import BaseFactorizer
from matfact.operators import FactorProduct
from matfact.solvers.finalize import finalize, input_scale, scaled_columns

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
    """

    products: list[FactorProduct]
    relative_error: float
    normalized_error: float
    layer_error: float | None
    seconds: float

    def nbytes(self, itemsize: int) -> int:
        """Return the bytes of values of `itemsize` bytes each and of their positions."""
        factors = [factor for product in self.products for factor in product]
        return sum(itemsize * f.nnz + f.index_nbytes("smallest") for f in factors)


def fit_layer(
    factorizer: BaseFactorizer,
    matrices: list[Array],
    statistics: list[InputStatistics] | None,
    adapt: Adaptation = "finalize",
) -> Fitted:
    """Factorize the matrices of a layer and measure the result.

    Parameters
    ----------
    factorizer : BaseFactorizer
        Fitted to each matrix in turn.
    matrices : list of array
        The matrices, of one shape.
    statistics : list of InputStatistics or None
        Those of the inputs of each.
    adapt : {"finalize", "finalize_one", "scale", "none"}
        What makes factorizers that cannot use the inputs themselves take them into account.
    """
    start = time.perf_counter()
    products = [
        _fit(factorizer, W, None if statistics is None else statistics[i], adapt)
        for i, W in enumerate(matrices)
    ]
    seconds = time.perf_counter() - start
    xp = backend.namespace(*matrices)
    W = xp.concat(matrices)
    W_hat = xp.concat([product.astype(W.dtype).toarray() for product in products])
    relative = metrics.relative_error(W, W_hat)
    nnz = sum(product.nnz for product in products)
    normalized = metrics.normalized_error(W, relative, nnz)
    layer_error = None if statistics is None else _layer_error(matrices, products, statistics)
    return Fitted(products, relative, normalized, layer_error, seconds)


def _fit(
    factorizer: BaseFactorizer, W: Array, statistics: InputStatistics | None, adapt: Adaptation
) -> FactorProduct:
    """Return the fitted product.

    Factorizers that cannot use the inputs are fitted to columns scaled by what enters them, and
    their values refitted to the inputs (paper 001, Section 4.3).
    """
    if statistics is not None and uses_inputs(factorizer):
        return factorizer.fit(W, calibration=statistics).operator_
    if statistics is None or adapt == "none":
        return factorizer.fit(W).operator_
    xp = backend.namespace(W)
    scale = xp.astype(input_scale(statistics.second_moment), W.dtype)
    product = scaled_columns(factorizer.fit(W * scale[None, :]).operator_, 1 / scale)
    if adapt == "scale":
        return product.rescaled(1.0)
    n_factors = 1 if adapt == "finalize_one" else None
    return finalize(product, W, statistics.second_moment, n_factors=n_factors).rescaled(1.0)


def uses_inputs(factorizer: BaseFactorizer) -> bool:
    """Whether `factorizer` takes calibration inputs itself."""
    return type(factorizer)._factorize_calibrated is not BaseFactorizer._factorize_calibrated


def _layer_error(
    matrices: list[Array], products: list[FactorProduct], statistics: list[InputStatistics]
) -> float:
    """Return the relative error of the outputs of all groups together."""
    error = total = 0.0
    for W, product, running in zip(matrices, products, statistics, strict=True):
        relative = metrics.layer_error(W, product.astype(W.dtype).toarray(), running.gram)
        energy = _output_energy(W, running.gram)
        total += energy
        error += energy * relative**2
    return math.sqrt(error / total) if total else 0.0


def _output_energy(W: Array, gram: Array) -> float:
    """Return ``‖XWᵀ‖_F²``."""
    xp = backend.namespace(W)
    W = backend.wide(W)
    return max(0.0, float(xp.sum(xp.matmul(W, gram) * W)))
