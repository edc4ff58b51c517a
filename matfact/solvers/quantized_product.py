"""Products whose values take few bits each, rounded with regard to what they are values of."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.kernels.rounding import round_rows
from matfact.operators import (
    DenseFactor,
    Factor,
    FactorProduct,
    QuantizedFactor,
    SparseFactor,
)
from matfact.operators._grid import group_numbers, thresholds
from matfact.operators._rounding import rounded
from matfact.solvers.finalize import finalize
from matfact.solvers.layerwise import squared_error

#: Rounds over all factors, and passes over the values of a factor in each.
ROUNDS, PASSES = 3, 6
#: Sweeps of conjugate gradients that refit the factors not rounded yet.
REFITS = 2


def quantize(
    product: FactorProduct,
    W: Array,
    bits: int,
    group_size: int | None = 64,
    second_moment: Array | None = None,
) -> FactorProduct:
    """Return `product` with values of few bits, which approximates `W` nearly as well.

    Factors are rounded in turn, from the input side. The values of those that are not rounded yet
    are refitted on their supports before. In two scattered factors values are then moved to other
    levels, one by one, as long as that lowers the error: each makes up for the errors of those
    before it. Rounds over both factors go on while they help.

    Parameters
    ----------
    product : FactorProduct
        Real factors, of any storage; kept as it is.
    W : array of shape (out_features, in_features)
        What they approximate.
    bits, group_size : int
        As for `FactorProduct.quantized`.
    second_moment : array of shape (in_features, in_features), optional
        Average of ``x xᵀ`` over inputs whose outputs count; without it all entries of `W` count
        alike.
    """
    xp = backend.namespace(W)
    metric = None if second_moment is None else xp.astype(second_moment, W.dtype)
    best = _in_turn(product, W, bits, group_size, second_moment)
    least = squared_error(W - best.astype(W.dtype).toarray(), metric)
    if len(best) != 2 or not all(_has_rows(factor) for factor in best):
        return best
    for _ in range(ROUNDS):
        found = _moved(best, W, metric)
        error = squared_error(W - found.astype(W.dtype).toarray(), metric)
        if error >= least * (1 - 1e-4):
            break
        best, least = found, error
    return best


def _has_rows(factor: Factor) -> bool:
    """Whether values of a quantized factor can be moved row by row."""
    return isinstance(factor, QuantizedFactor) and isinstance(
        factor.pattern, SparseFactor | DenseFactor
    )


def _in_turn(
    product: FactorProduct, W: Array, bits: int, group_size: int | None, second_moment: Array | None
) -> FactorProduct:
    """Return the product with its factors rounded one after the other, from the input side."""
    factors = list(product.factors)
    for i in range(len(factors) - 1, -1, -1):
        factors[i] = rounded(factors[i], bits, group_size)
        if i:
            refitted = finalize(
                FactorProduct(factors), W, second_moment, n_sweeps=REFITS, n_factors=i
            )
            factors[:i] = refitted.factors[:i]
    return FactorProduct(factors)


def _moved(product: FactorProduct, W: Array, metric: Array | None) -> FactorProduct:
    """Return two quantized factors with levels moved, those of the input side first."""
    xp = backend.namespace(W)
    left, right = product.factors
    assert isinstance(left, QuantizedFactor)
    assert isinstance(right, QuantizedFactor)
    A = left.decoded().toarray()
    transpose = xp.matrix_transpose
    # Columns of the right factor depend on each other only by correlations of inputs, which the
    # left one, moved after it, makes up for.
    right = _moved_rows(right, transpose(W), transpose(A), None, by_columns=True)
    B = right.decoded().toarray()
    left = _moved_rows(left, W, B, metric, by_columns=False)
    return FactorProduct([left, right])


def _moved_rows(
    factor: QuantizedFactor, target: Array, other: Array, metric: Array | None, *, by_columns: bool
) -> QuantizedFactor:
    """Return the factor with levels moved so that ``X · other`` comes nearer to `target`.

    `X` is the factor, or its transpose `by_columns`.
    """
    xp = backend.namespace(target)
    known = other if metric is None else xp.matmul(other, metric)
    gram = backend.to_numpy(xp.matmul(known, xp.matrix_transpose(other)))
    cross = backend.to_numpy(xp.matmul(target, xp.matrix_transpose(known)))
    rows, columns = factor.shape
    places = factor.locations
    order = (
        np.lexsort((places // columns, places % columns)) if by_columns else np.arange(len(places))
    )
    row, column = places[order] // columns, places[order] % columns
    row, column, n_rows = (column, row, columns) if by_columns else (row, column, rows)
    indptr = np.searchsorted(row, np.arange(n_rows + 1))
    flat = backend.to_numpy(factor.values).reshape(-1)[order]
    levels = np.unique(flat).astype(np.float64)
    group = group_numbers(factor.bounds)[order]
    scales = backend.to_numpy(factor.scales).astype(np.float64)[group]
    codes = np.searchsorted(levels, flat)
    X = backend.to_numpy(factor.decoded().toarray())
    gradient = (X.T if by_columns else X).astype(np.float64) @ gram - cross
    gram = gram.astype(np.float64)
    round_rows(codes, scales, levels, thresholds(levels), column, indptr, gradient, gram, PASSES)
    moved = np.empty_like(flat)
    moved[order] = levels[codes].astype(np.int8)
    values = backend.like(moved.reshape(factor.values.shape), factor.values)
    return QuantizedFactor(values, factor.scales, factor.bits, factor.group_size, factor.pattern)
