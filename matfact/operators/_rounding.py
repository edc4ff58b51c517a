"""Factors with their values rounded to few bits."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.operators._factor import Factor
from matfact.operators._grid import Grid, fit_grid
from matfact.operators._quantized import QuantizedFactor, group_bounds


def rounded(factor: Factor, bits: int, group_size: int | None) -> Factor:
    """Return the factor with each value rounded to the nearest level of its group.

    Factors that store no values, and those that are quantized, stay as they are.
    """
    if not np.prod(factor.values.shape) or isinstance(factor, QuantizedFactor):
        return factor
    bounds = group_bounds(factor, group_size)
    values = backend.to_numpy(backend.compute_array(factor.values)).reshape(-1)
    grid = fit_grid(values, bounds, bits)
    return quantized_factor(factor, grid.nearest(values, bounds), grid, bits, group_size)


def quantized_factor(
    pattern: Factor, levels: np.ndarray, grid: Grid, bits: int, group_size: int | None
) -> QuantizedFactor:
    """Return levels and scales as a factor with the positions, library and dtype of `pattern`."""
    values = backend.like(levels.reshape(pattern.values.shape), pattern.values)
    scales = backend.like(grid.scales, pattern.values, dtype=pattern.dtype)
    return QuantizedFactor(values, scales, bits, group_size, pattern)
