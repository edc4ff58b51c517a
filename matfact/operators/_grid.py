"""Levels and scales for values that may take few bits each."""

from __future__ import annotations

import dataclasses

import numpy as np

#: Largest level: levels are stored in 8 bits.
LARGEST = 127
#: Rounds of assigning levels and moving levels and scales, and bins of the first levels' density.
ROUNDS, BINS = 12, 1024
#: Shares of its largest magnitude that a group of 8-bit values may be clipped to.
CLIPPED = np.linspace(0.7, 1.0, 7)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What groups of values are rounded to: integer levels times a scale for each group.

    Parameters
    ----------
    levels : ndarray of int8
        Increasing; 0 is not always among them.
    scales : ndarray of float64, of shape (n_groups,)
        Representable in 16 bits up to a power of two that all share.
    """

    levels: np.ndarray
    scales: np.ndarray

    def nearest(self, values: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Return the nearest level of each value, given the number of its group."""
        return self.levels[_nearest(values / self.scales[group], self.levels.astype(np.float64))]


def fit_grid(
    values: np.ndarray, bounds: np.ndarray, bits: int, weights: np.ndarray | None = None
) -> Grid:
    """Return the grid of ``2**bits`` levels with a low squared error.

    Lloyd's algorithm (Lloyd 1982, "Least squares quantization in PCM", method I) on values
    divided by the scales of their groups, in turn with the least squares scale of each group. With
    8 bits levels are all integers, and groups choose only where they are clipped.

    Parameters
    ----------
    values : ndarray of shape (n_values,)
        What is to be rounded.
    bounds : ndarray of shape (n_groups + 1,)
        Where each group begins, and where the last one ends.
    bits : int
        From 2 to 8.
    weights : ndarray of shape (n_values,), optional
        How much the squared error of each value counts.
    """
    values = values.astype(np.float64)
    counted = np.ones_like(values) if weights is None else weights.astype(np.float64)
    group, n_groups = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)), len(bounds) - 1
    if not values.any():
        return Grid(np.arange(-1, 1, dtype=np.int8), np.ones(n_groups))
    if bits == 8:
        levels = np.arange(-LARGEST, LARGEST + 1.0)
        return Grid(levels.astype(np.int8), _rounded(_clipped(values, group, bounds, counted)))
    energy = np.bincount(group, counted * values**2, n_groups)
    total = np.bincount(group, counted, n_groups)
    scales = _used(np.sqrt(energy / np.where(total > 0, total, 1.0)))
    levels = _first_levels(values / scales[group], 2**bits)
    for _ in range(ROUNDS):
        code = _nearest(values / scales[group], levels)
        weight = counted * scales[group] ** 2
        mass = np.bincount(code, weight, len(levels))
        mean = np.bincount(code, counted * scales[group] * values, len(levels))
        levels = np.sort(np.where(mass > 0, mean / np.where(mass > 0, mass, 1.0), levels))
        scales = _least_squares(values, levels[code], group, counted, scales)
    unit = np.abs(levels).max() / LARGEST
    whole = np.unique(np.round(levels / unit))
    scales = scales * unit
    for _ in range(2):
        code = _nearest(values / scales[group], whole)
        scales = _least_squares(values, whole[code], group, counted, scales)
    return Grid(whole.astype(np.int8), _rounded(scales))


def _least_squares(
    values: np.ndarray,
    rounded: np.ndarray,
    group: np.ndarray,
    weights: np.ndarray,
    kept: np.ndarray,
) -> np.ndarray:
    """Return the best scale of each group, that of before where all its levels are zero."""
    energy = np.bincount(group, weights * rounded**2, len(kept))
    inner = np.bincount(group, weights * rounded * values, len(kept))
    scales = inner / np.where(energy > 0, energy, 1.0)
    return np.where(scales > 0, scales, kept)


def _clipped(
    values: np.ndarray, group: np.ndarray, bounds: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the scale of each group by which all integers up to the largest serve it best."""
    largest = _used(np.maximum.reduceat(np.abs(values), bounds[:-1])) / LARGEST
    best, least = largest, np.full(len(largest), np.inf)
    for share in CLIPPED:
        scales = share * largest
        scaled = values / scales[group]
        lost = np.clip(np.round(scaled), -LARGEST, LARGEST) - scaled
        error = np.bincount(group, weights * (lost * scales[group]) ** 2, len(largest))
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def _first_levels(values: np.ndarray, count: int) -> np.ndarray:
    """Return levels as dense as the cube root of the density of values, which is nearly optimal."""
    density, edges = np.histogram(values, BINS)
    mass = np.cumsum(np.cbrt(density))
    places = (np.arange(count) + 0.5) / count * mass[-1]
    return np.interp(places, np.concatenate([[0.0], mass]), edges)


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of some increasing levels."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)


def _used(scales: np.ndarray) -> np.ndarray:
    """Return the scales with those that are zero replaced by the largest."""
    return np.where(scales > 0, scales, scales.max())


def _rounded(scales: np.ndarray) -> np.ndarray:
    """Return the scales rounded to 16 bits, those far below the largest to what is left of them."""
    unit = scale_unit(scales)
    least = float(np.finfo(np.float16).smallest_normal)
    return np.maximum(scales / unit, least).astype(np.float16).astype(np.float64) * unit


def scale_unit(scales: np.ndarray) -> float:
    """Return the power of two by which scales are divided before they are stored in 16 bits."""
    return float(2.0 ** (np.floor(np.log2(np.abs(scales).max())) - 14)) if scales.any() else 1.0
