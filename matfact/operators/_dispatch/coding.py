"""Quantized values and signs as the bytes that the kernels read: see ``kernels.coded``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from matfact.kernels import quantized, signs

# Factors are told by their kind, since their modules import this part of the house.
#: Bytes of a floating point number, which a scale is too, and of a column.
_NUMBER, _COLUMN = 4, 2
_HALF = 63  #: largest integer that is stored doubled, so that each can be split in two


class Slices(NamedTuple):
    """A quantized matrix as slices of rows: see ``kernels.quantized.arranged``.

    `columns` is None where consecutive entries have consecutive columns.
    """

    integers: np.ndarray
    columns: np.ndarray | None
    slices: np.ndarray
    rows: np.ndarray
    parts: np.ndarray
    scales: np.ndarray


def pays(factor: Any) -> bool:
    """Whether slices of a quantized factor take less memory than floating point numbers."""
    if factor.kind != "quantized":
        return False
    lanes = quantized.VECTOR // _NUMBER
    if factor.pattern.kind == "dense":
        rows = factor.shape[0]
        n_slices, n_groups = -(-rows // lanes), (len(factor.bounds) - 1) // max(1, rows)
        needed = n_slices * lanes * (factor.shape[1] + _NUMBER * n_groups)
        return needed <= _NUMBER * factor.nnz
    if factor.pattern.kind != "csr":
        return False
    *_, n_entries, n_parts = _grouped(factor, factor.pattern, lanes)
    needed = n_entries * (1 + _COLUMN) + n_parts * lanes * _NUMBER
    return bool(needed <= factor.nnz * (_NUMBER + _COLUMN))


def slices(factor: Any, dtype: np.dtype) -> Slices:
    """Return the slices of a factor that is dense or in compressed sparse rows."""
    if factor.pattern.kind == "csr":
        return _sparse(factor, factor.pattern, dtype)
    return _dense(factor, dtype)


def _dense(factor: Any, dtype: np.dtype) -> Slices:
    (n_rows, n_columns), lanes = factor.shape, quantized.VECTOR // dtype.itemsize
    n_slices = -(-n_rows // lanes)
    rows = np.minimum(np.arange(n_slices * lanes), n_rows - 1).reshape(n_slices, lanes)
    integers = factor.values[rows].swapaxes(1, 2)
    n_groups = (len(factor.bounds) - 1) // max(1, n_rows)
    bounds = factor.bounds[: n_groups + 1]
    parts = np.empty((n_slices, n_groups, 3), np.int64)
    parts[:, :, 0] = (np.arange(n_slices)[:, None] * n_columns + bounds[:-1]) * lanes
    parts[:, :, 1], parts[:, :, 2] = np.diff(bounds), bounds[:-1]
    found = np.zeros((n_slices + 1, 2), np.int64)
    found[:, 0] = np.arange(n_slices + 1) * n_groups
    found[:-1, 1] = np.minimum(lanes, n_rows - np.arange(n_slices) * lanes)
    groups = rows[:, None, :] * n_groups + np.arange(n_groups)[:, None]
    return Slices(integers, None, found, rows, parts, factor.scales[groups].astype(dtype))


def _sparse(factor: Any, pattern: Any, dtype: np.dtype) -> Slices:
    lanes = quantized.VECTOR // dtype.itemsize
    levels, doubled, order, firsts, begins, n_entries, _ = _grouped(factor, pattern, lanes)
    integers, columns, found, rows, parts, groups = quantized.arranged(
        order, begins, firsts, factor.bounds, levels, pattern.indices, n_entries, lanes
    )
    scales = factor.scales[groups].astype(dtype) / (2 if doubled else 1)
    return Slices(integers, columns, found, rows, parts, scales)


def _grouped(
    factor: Any, pattern: Any, lanes: int
) -> tuple[np.ndarray, bool, np.ndarray, np.ndarray, Any, int, int]:
    """Return the integers to store and which rows form slices: see ``quantized.sliced``."""
    levels, bounds = factor.values, factor.bounds
    doubled = bool(len(levels)) and int(np.abs(levels).max()) <= _HALF
    levels = 2 * levels if doubled else levels
    firsts = np.searchsorted(bounds, pattern.indptr).astype(np.int64)
    sizes = np.diff(bounds)
    splittable = np.add.reduceat(np.abs(levels) != 1, bounds[:-1]) if len(sizes) else sizes
    order = np.lexsort((-np.diff(pattern.indptr), -np.diff(firsts)))
    begins, n_entries, n_parts = quantized.sliced(
        order, firsts, sizes, splittable.astype(np.int64), lanes
    )
    return levels, doubled, order, firsts, begins, int(n_entries), int(n_parts)


def sign_words(bits: np.ndarray, shape: tuple[int, int], itemsize: int) -> tuple[np.ndarray, int]:
    """Return the words of a matrix of signs as ``kernels.signs`` reads them, and those of a row.

    `bits` are those of `numpy.packbits`; words are as long as numbers of `itemsize` bytes.
    """
    rows, columns = shape
    lanes, (per_code, n_codes) = signs.VECTOR // itemsize, signs.layout(itemsize)
    n_slices, n_words = -(-rows // lanes), -(-columns // (per_code * n_codes))
    padded = np.zeros((n_slices * lanes, n_words * n_codes * per_code), np.uint8)
    padded[:rows, :columns] = np.unpackbits(bits, count=rows * columns).reshape(shape)
    padded = padded.reshape(n_slices, lanes, n_words, n_codes, per_code)
    word = np.dtype(f"u{itemsize}").type
    words = np.zeros((n_slices, n_words, lanes), word)
    for i in range(n_codes):
        for j in range(per_code):
            words |= padded[:, :, :, i, j].swapaxes(1, 2).astype(word) << word(4 * i + j)
    groups = [words[:, w : w + signs.GROUP].ravel() for w in range(0, n_words, signs.GROUP)]
    return np.concatenate([np.zeros(0, word), *groups]), n_words
