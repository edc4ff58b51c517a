"""Rounding a matrix to few levels: each weight to the nearest, and with error feedback (GPTQ)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators import _grid
from matfact.solvers.error_feedback import Settle, feedback, sweep


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix of few levels times scales.

    Parameters
    ----------
    levels : array of int8, of shape (rows, columns)
        The level of each weight.
    scales : array of shape (rows, n_groups)
        What the levels of each group of columns are multiplied with, in the dtype of the matrix.
    objective : float
        Squared error that was minimized.
    """

    levels: Array
    scales: Array
    objective: float


def round_to_nearest(
    W: Array,
    bounds: np.ndarray,
    bits: int,
    *,
    min_max: bool,
    weights: np.ndarray | None = None,
) -> Rounded:
    """Return each weight rounded to the nearest level of its group.

    Parameters
    ----------
    W, bounds, bits, min_max
        As for `gptq`.
    weights : ndarray of shape (columns,), optional
        Weight of the squared errors of each column when levels and scales are fitted.
    """
    host = np.ascontiguousarray(backend.to_numpy(W), np.float64)
    groups = _row_groups(host.shape[0], bounds)
    counted = np.ones(host.shape[1]) if weights is None else weights
    tiled = np.tile(counted, host.shape[0])
    if min_max:
        grid = _grid.min_max_grid(host.reshape(-1), groups, bits)
    else:
        grid = _grid.fit_grid(host.reshape(-1), groups, bits, tiled)
    levels = grid.nearest(host.reshape(-1), groups)
    lost = host.reshape(-1) - levels * grid.scales[_grid.group_numbers(groups)]
    levels = backend.like(levels.reshape(host.shape), W)
    return _rounded(W, levels, grid.scales, float((tiled * lost) @ lost))


def gptq(
    W: Array,
    gram: Array,
    bounds: np.ndarray,
    bits: int,
    *,
    damping: float,
    act_order: bool | Literal["auto"],
    min_max: bool,
) -> Rounded:
    """Lower ``‖X (W − Ŵ)ᵀ‖_F²`` over matrices `Ŵ` of few levels times scales.

    Source: Frantar et al. (2023); with `act_order` and scales known from the start as in its
    authors' code.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision.
    bounds : ndarray of shape (n_groups + 1,)
        Columns whose weights in a row share a scale: where each group begins, and the last ends.
    bits : int
        From 2 to 8.
    damping : float
        What is added to the diagonal of `gram`, relative to its mean.
    act_order : bool or "auto"
        Whether inputs of the largest second moment come first. Scales are those of the weights as
        given, then; else they are fitted once the inputs before a group are rounded. "auto" tries
        both.
    min_max : bool
        Whether levels are evenly spaced and none is clipped.

    References
    ----------
    - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate post-training
      quantization for generative pre-trained transformers", ICLR 2023.
    """
    orders = (False, True) if act_order == "auto" else (bool(act_order),)
    found = [_sweep(W, gram, bounds, bits, damping, each, min_max) for each in orders]
    return min(found, key=lambda rounded: rounded.objective)


def _sweep(
    W: Array,
    gram: Array,
    bounds: np.ndarray,
    bits: int,
    damping: float,
    act_order: bool,
    min_max: bool,
) -> Rounded:
    xp, (rows, columns) = backend.namespace(W), W.shape
    order = np.arange(columns)
    if act_order:
        order = np.argsort(-backend.to_numpy(xp.linalg.diagonal(gram)), kind="stable")
        gram = _permuted(_permuted(gram, order, 0), order, 1)
    found = feedback(gram, damping).astype(W.dtype)
    weights = np.empty(columns)
    weights[order] = backend.to_numpy(found.weights)
    host = backend.to_numpy(W)
    grids = _Grids(host, bounds, bits, weights, min_max)
    levels = xp.zeros((columns, rows), dtype=xp.int8, device=backend.device(W))
    group = np.searchsorted(bounds, order, side="right") - 1
    scales = np.zeros((rows, len(bounds) - 1))
    choices = backend.like(grids.levels, W, W.dtype)
    middles = backend.like(_grid.thresholds(grids.levels), W, W.dtype)

    def begin(panel: slice, T: Array) -> Settle:
        if act_order:
            for i in range(len(bounds) - 1):
                scales[:, i] = grids.scales(host[:, bounds[i] : bounds[i + 1]], i)
        else:
            transposed = backend.to_numpy(T).T
            scales[:, group[panel.start]] = grids.scales(transposed, group[panel.start])
        divisors = backend.like(np.where(scales == 0.0, 1.0, scales), W, W.dtype)
        multipliers = backend.like(scales, W, W.dtype)

        def settle(place: int, target: Array) -> Array:
            i = panel.start + place
            codes = xp.searchsorted(middles, target / divisors[:, int(group[i])])
            chosen = xp.take(choices, codes, axis=0)
            levels[i, :] = xp.astype(chosen, xp.int8)
            return chosen * multipliers[:, int(group[i])]

        return settle

    T = backend.contiguous(xp.matrix_transpose(_permuted(W, order, 1)))
    panels = [0, columns] if act_order else bounds.tolist()
    _, objective = sweep(T, found, panels, begin)
    back = np.argsort(order)
    levels = backend.contiguous(xp.matrix_transpose(_permuted(levels, back, 0)))
    return _rounded(W, levels, scales.reshape(-1), objective)


class _Grids:
    """The levels of a matrix, and the scales by which they serve a group of its columns."""

    def __init__(
        self, W: np.ndarray, bounds: np.ndarray, bits: int, weights: np.ndarray, min_max: bool
    ) -> None:
        self._bounds, self._bits, self._min_max, self._weights = bounds, bits, min_max, weights
        groups = _row_groups(len(W), bounds)
        flat, counted = W.reshape(-1), np.tile(weights, len(W))
        if min_max:
            self.levels = _grid.min_max_grid(flat, groups, bits).levels
        else:
            self.levels = _grid.fit_levels(flat, groups, bits, counted)

    def scales(self, values: np.ndarray, group: int) -> np.ndarray:
        """Return the scale of each row of `values`, the weights of a group of columns."""
        rows, width = values.shape
        flat, groups = np.ascontiguousarray(values).reshape(-1), np.arange(rows + 1) * width
        if self._min_max:
            return _grid.min_max_grid(flat, groups, self._bits).scales
        start, stop = self._bounds[group], self._bounds[group + 1]
        counted = np.tile(self._weights[start:stop], rows)
        return _grid.fit_scales(flat, groups, self.levels, counted)


def _row_groups(rows: int, bounds: np.ndarray) -> np.ndarray:
    """Return where groups begin in a flattened matrix whose rows have groups at `bounds`."""
    starts = np.arange(rows)[:, None] * bounds[-1] + bounds[:-1]
    return np.append(starts.reshape(-1), rows * bounds[-1])


def _permuted(array: Array, order: np.ndarray, axis: int) -> Array:
    return backend.namespace(array).take(array, backend.like(order, array), axis=axis)


def _rounded(W: Array, levels: Array, scales: np.ndarray, objective: float) -> Rounded:
    """Return levels and scales in the library and dtype of `W`, scales as they can be stored."""
    xp = backend.namespace(W)
    scales = _grid.rounded_scales(scales).reshape(W.shape[0], -1)
    levels = xp.astype(levels, xp.int8, copy=False)
    return Rounded(levels, backend.like(scales, W, W.dtype), objective)
