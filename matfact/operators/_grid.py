"""Levels and scales for values that may take few bits each."""

from __future__ import annotations

import dataclasses

import numpy as np

#: Largest level: levels are stored in 8 bits.
LARGEST = 127
#: Rounds of moving levels, on about so many values, and bins of the first levels' density.
ROUNDS, SAMPLE, BINS = 16, 1 << 15, 1024
#: Scales that are tried, relative to the least by which no value of a group is beyond the levels.
SHARES = np.outer([1.0, -1.0], [0.6, 0.7, 0.78, 0.85, 0.9, 0.95, 1.0]).ravel()


@dataclasses.dataclass(frozen=True)
class Grid:
    """What groups of values are rounded to: integer levels times a scale for each group.

    Parameters
    ----------
    levels : ndarray of int8
        Increasing; 0 is not always among them.
    scales : ndarray of float64, of shape (n_groups,)
        Of either sign, or 0; representable in 16 bits up to a power of two that all share.
    """

    levels: np.ndarray
    scales: np.ndarray

    def nearest(self, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Return the nearest level of each value, given where groups begin and the last ends."""
        scales = self.scales[group_numbers(bounds)]
        scaled = values / np.where(scales == 0.0, 1.0, scales)
        return self.levels[np.searchsorted(thresholds(self.levels), scaled)]


def fit_grid(
    values: np.ndarray, bounds: np.ndarray, bits: int, weights: np.ndarray | None = None
) -> Grid:
    """Return the grid of ``2**bits`` levels with a low squared error.

    Lloyd's algorithm (Lloyd 1982, "Least squares quantization in PCM", method I) on values
    divided by the scales of their groups, which are chosen anew for the levels of every round.
    Scales may be negative, so that levels need not be symmetric: the farthest one serves the
    largest value of a group, whatever its sign. With 8 bits levels are all integers, and groups
    choose only where they are clipped.

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
    levels = fit_levels(values, bounds, bits, weights)
    return Grid(levels, fit_scales(values, bounds, levels, weights))


def min_max_grid(values: np.ndarray, bounds: np.ndarray, bits: int) -> Grid:
    """Return the grid of evenly spaced levels by which no value of a group is far beyond them.

    As common in publications: ``2**bits`` integers from ``-2**(bits - 1)`` on, and the scale
    ``2 max |w| / (2**bits - 1)``. With 8 bits levels are from −127 to 127.
    """
    half = 2 ** (bits - 1)
    levels = np.arange(max(-half, -LARGEST), half)
    largest = np.maximum.reduceat(np.abs(values.astype(np.float64)), bounds[:-1])
    return Grid(levels.astype(np.int8), rounded_scales(2 * largest / (len(levels) - 1)))


def fit_levels(
    values: np.ndarray, bounds: np.ndarray, bits: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the levels of `fit_grid`."""
    if bits == 8:
        return np.arange(-LARGEST, LARGEST + 1).astype(np.int8)
    values, bounds, weights = _sampled(values, bounds, weights)
    signed = np.maximum.reduceat(values, bounds[:-1])
    least = np.minimum.reduceat(values, bounds[:-1])
    signed = np.repeat(np.where(signed >= -least, signed, least), np.diff(bounds))
    if not signed.any():
        return np.arange(-1, 1, dtype=np.int8)
    levels = _first_levels(values / np.where(signed == 0.0, 1.0, signed), 2**bits)
    for _ in range(ROUNDS):
        scales = _scales(values, bounds, levels, weights)
        from matfact.kernels import rounding  # Numba is loaded where it is needed

        mass, total = rounding.level_means(
            values, weights, bounds, thresholds(levels), scales, len(levels)
        )
        levels = np.sort(np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), levels))
    return np.unique(np.round(levels * (LARGEST / np.abs(levels).max()))).astype(np.int8)


def fit_scales(
    values: np.ndarray, bounds: np.ndarray, levels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the scale of each group that serves it best with these levels, in 16 bits."""
    values = np.ascontiguousarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else weights.astype(np.float64)
    return rounded_scales(_scales(values, bounds, levels.astype(np.float64), weights))


def group_numbers(bounds: np.ndarray) -> np.ndarray:
    """Return the number of the group of each value."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def thresholds(levels: np.ndarray) -> np.ndarray:
    """Return what parts values by their nearest level: one less than a power of two of them."""
    middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    return np.append(middles, np.full(2 ** len(middles).bit_length() - 1 - len(middles), np.inf))


def _scales(
    values: np.ndarray, bounds: np.ndarray, levels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    scales = np.empty(len(bounds) - 1)
    from matfact.kernels import rounding

    rounding.best_scales(values, weights, bounds, levels, thresholds(levels), SHARES, scales)
    return scales


def _sampled(
    values: np.ndarray, bounds: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values, bounds and weights of evenly spread groups."""
    n_groups = len(bounds) - 1
    count = max(1, min(n_groups, SAMPLE * n_groups // max(1, len(values))))
    chosen = np.arange(count) * n_groups // count
    lengths = np.diff(bounds)[chosen]
    ends = np.cumsum(lengths)
    places = np.repeat(bounds[chosen] - (ends - lengths), lengths) + np.arange(ends[-1])
    sample = values[places].astype(np.float64)
    counted = np.ones_like(sample) if weights is None else weights[places].astype(np.float64)
    return sample, np.append(0, ends), counted


def _first_levels(values: np.ndarray, count: int) -> np.ndarray:
    """Return levels as dense as the cube root of the density of values, which is nearly optimal."""
    # Values are relative to the largest of their group: equal ones differ by rounding alone.
    density, edges = np.histogram(values, BINS, range=(min(values.min(), 1 - 1e-6), 1))
    mass = np.cumsum(np.cbrt(density))
    places = (np.arange(count) + 0.5) / count * mass[-1]
    return np.interp(places, np.concatenate([[0.0], mass]), edges)


def rounded_scales(scales: np.ndarray) -> np.ndarray:
    """Return the scales rounded to 16 bits, those far below the largest to what is left of them."""
    unit = scale_unit(scales)
    return (scales / unit).astype(np.float16).astype(np.float64) * unit


def scale_unit(scales: np.ndarray) -> float:
    """Return the power of two by which scales are divided before they are stored in 16 bits."""
    return float(2.0 ** (np.floor(np.log2(np.abs(scales).max())) - 14)) if scales.any() else 1.0
