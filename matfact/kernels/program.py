"""The factors of a product as one flat program for the fused kernels."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from typing import Any

import numpy as np

from matfact._threads import allowed_threads
from matfact.kernels import csr, fused, helpers
from matfact.kernels.blocks import TILE

_HELP = 1 << 15  #: multiplications of vectors from which a second thread pays
_DOT_SPEED = 3  #: values of a single column that take as long as one multiplication of vectors
_PAIR = 16  #: entries of the largest block whose rows cost more than its values
_PIECES = 4  #: parts of a factor for each thread, so that a late one still finds work
_VECTOR_PIECES = 2  #: the same for a single column, which comes from memory in longer stretches
_CACHE_LINE = 64  #: bytes; vectors that straddle two take twice as long
_memory = threading.local()  #: scratch space, kept from call to call


class Program:
    """Steps to apply, in that order, with their values in one array.

    Parameters
    ----------
    dtype : dtype
        float32 or float64, in which results are computed.
    half : {"", "float16", "bfloat16"}
        Which 16-bit numbers all values are, if they are; bfloat16 numbers are given as their bits.
    columns : int
        Rows of the operand.
    """

    def __init__(self, dtype: Any, half: str, columns: int) -> None:
        self.dtype = np.dtype(dtype)
        self._half = half
        self.columns = columns
        self._largest = columns
        self.counts = {"call": 1, "row": columns, "csr": 0, "pair": 0, "block": 0}
        self._steps: list[list[int]] = []
        self._values: list[np.ndarray] = []
        self._indices: list[np.ndarray] = []
        self._table: list[np.ndarray] = []

    def add_csr(self, values: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> None:
        """Add a matrix in compressed sparse rows."""
        rows, lanes = len(indptr) - 1, fused.DOT // self.dtype.itemsize
        order = np.argsort(-np.diff(indptr), kind="stable")
        slices, ends, entries = csr.arranged(indptr, order, lanes)
        place = {"TABLE": self._append(self._table, slices)}
        place["A"] = self._append(self._table, order)
        place["B"] = self._append(self._table, ends)
        place["C"] = lanes
        place["COLUMNS"] = self._append(self._indices, indices[entries])
        self._add(fused.CSR, rows, len(slices), len(slices), values[entries], place)

    def add_kronecker(self, values: np.ndarray) -> None:
        """Add a Kronecker-sparse matrix from values of shape (a, d, b, c)."""
        a, d, b, c = values.shape
        units = a * d * -(-b // TILE)
        self._add(
            fused.KRONECKER, a * b * d, units, a * d, values, {"A": a, "B": b, "C": c, "D": d}
        )

    def add_blocks(self, values: np.ndarray, blocks: np.ndarray, rows: int) -> None:
        """Add dense blocks, given by first and last rows and columns."""
        tiles, pieces = _bands(blocks, rows, sum(map(np.size, self._values)))
        place = {"TABLE": self._append(self._table, tiles)}
        place["A"] = self._append(self._table, pieces)
        place["B"] = place["A"] + pieces.size
        self._add(fused.BANDS, rows, len(tiles), len(tiles), values, place)

    def add_selection(self, index: np.ndarray) -> None:
        """Add a choice of rows, negative where there is none."""
        place = {"TABLE": self._append(self._table, index)}
        self._add(fused.SELECTION, len(index), len(index), len(index), np.zeros(0), place)

    def _append(self, parts: list[np.ndarray], array: np.ndarray) -> int:
        start = sum(map(np.size, parts))
        parts.append(array)
        return start

    def _add(
        self, kind: int, rows: int, panel_units: int, vector_units: int, values: np.ndarray,
        place: dict[str, int],
    ) -> None:  # fmt: skip
        step = [0] * fused.STEP_FIELDS
        step[: fused.VALUES] = [kind, rows, panel_units, vector_units]
        step[fused.VALUES] = self._append(self._values, values)
        for name, number in place.items():
            step[getattr(fused, name)] = number
        self._steps.append(step)
        pair = kind == fused.KRONECKER and place["B"] * place["C"] <= _PAIR
        cost = "pair" if pair else ("csr", "block", "block", "row")[kind]
        self.counts[cost] += rows if kind == fused.SELECTION else values.size
        self._largest = max(self._largest, rows)

    def finish(self) -> Program:
        """Lay everything out flat; nothing can be added afterwards."""
        stored = {"": self.dtype, "float16": np.float16, "bfloat16": np.int16}[self._half]
        values = np.concatenate([np.ravel(v).astype(stored, copy=False) for v in self._values])
        narrow = self._largest <= 1 << 16
        indices = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, self._indices)])
        table = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, self._table)])
        self._arrays: tuple[np.ndarray, ...] = (
            np.asarray(self._steps, np.int64),
            values.view(np.uint16) if self._half == "float16" else values,
            indices.astype(np.uint16 if narrow else np.uint32),
            table.astype(np.int64),
        )
        self.rows = self._steps[-1][fused.ROWS]
        self.counts["row"] += self.rows  # to pack and unpack
        self._n_values = sum(self.counts.values())
        self._values, self._indices, self._table = [], [], []
        return self._located()

    def copy(self) -> Program:
        """Return the same program, elsewhere in memory."""
        other = copy.copy(self)
        other._arrays = tuple(map(np.copy, self._arrays))
        return other._located()

    def _located(self) -> Program:
        """Note where the arrays are."""
        steps, values, indices, table = self._arrays
        self._job = np.zeros(fused.COUNTERS + 2 * fused.SPACING * (len(steps) + 2), np.int64)
        self._job[: fused.TABLE_DATA + 1] = (
            steps.ctypes.data, len(steps), values.ctypes.data, indices.ctypes.data,
            table.ctypes.data,
        )  # fmt: skip
        self._kinds = (values[:0], indices[:0])
        return self

    def threads(self, batch: int) -> int:
        """Return how many threads a batch is worth."""
        values = self._n_values
        vectors = values * batch * self.dtype.itemsize // fused.NARROW
        if batch == 1:
            vectors = values // _DOT_SPEED
        return min(allowed_threads(), 1 + vectors // _HELP)

    def apply(self, X: np.ndarray, threads: int | None = None) -> np.ndarray:
        """Return the product with `X`, of shape (columns, batch).

        The result is laid out like `X`: row by row, or column by column.
        """
        threads = threads or self.threads(X.shape[1])
        batch = X.shape[1]
        by_columns = X.flags.f_contiguous and not X.flags.c_contiguous
        X = np.ascontiguousarray(X.T if by_columns else X, self.dtype)
        flat = (X if X.flags.writeable else X.copy()).reshape(-1)  # Numba has a type for read-only
        out = np.empty((batch, self.rows) if by_columns else (self.rows, batch), self.dtype)
        job = self._job.copy()
        job[fused.ROWS_IN], job[fused.BATCH] = self.columns, batch
        job[fused.X_ROW], job[fused.X_COLUMN] = _strides(by_columns, self.columns, batch)
        job[fused.OUT_ROW], job[fused.OUT_COLUMN] = _strides(by_columns, self.rows, batch)
        if batch == 1:
            self._apply_vector(job, flat, out, threads)
        elif batch:
            self._apply_panels(job, flat, out, threads)
        return out.T if by_columns else out

    def _apply_vector(self, job: np.ndarray, X: np.ndarray, out: np.ndarray, threads: int) -> None:
        job[fused.PIECES] = 1 if threads == 1 else _VECTOR_PIECES * threads
        self._share(fused.apply_vector, job, X, out, (2, self._largest), threads)

    def _apply_panels(self, job: np.ndarray, X: np.ndarray, out: np.ndarray, threads: int) -> None:
        batch = int(job[fused.BATCH])
        wide, narrow = (n // self.dtype.itemsize for n in (fused.WIDE, fused.NARROW))
        n_wide = (batch + wide // 2 - 1) // wide  # what is left over goes into narrow panels
        n_panels = n_wide + max(0, -(-(batch - n_wide * wide) // narrow))
        lanes = wide if n_wide else narrow
        whole = threads == 1 or n_panels >= 2 * threads
        job[fused.PANELS : fused.PIECES + 1] = n_panels, n_wide, 0 if whole else _PIECES * threads
        rows = min(threads, n_panels) if whole else n_panels
        self._share(fused.apply_panels, job, X, out, (rows, 2 * self._largest * lanes), threads)

    def _share(
        self, kernel: helpers.Kernel, job: np.ndarray, X: np.ndarray, out: np.ndarray,
        scratch_shape: tuple[int, int], threads: int,
    ) -> None:  # fmt: skip
        job[fused.SCRATCH_ROWS], job[fused.SCRATCH_SIZE] = scratch_shape
        scratch = self._scratch(math.prod(scratch_shape))
        helpers.together(kernel, job, (*self._kinds, X, out.reshape(-1), scratch), threads)

    def _scratch(self, size: int) -> np.ndarray:
        """Return uninitialized memory that belongs to this thread until its next product."""
        nbytes = size * self.dtype.itemsize
        memory = getattr(_memory, "array", None)
        if memory is None or memory.nbytes < nbytes:
            memory = np.empty(nbytes + _CACHE_LINE, np.uint8)
            _memory.array = memory = memory[-memory.ctypes.data % _CACHE_LINE :]
        return memory[:nbytes].view(self.dtype)


def _strides(by_columns: bool, rows: int, batch: int) -> tuple[int, int]:
    return (1, rows) if by_columns else (batch, 1)


def _bands(blocks: np.ndarray, rows: int, origin: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut blocks into tiles of a few rows: see ``kernels.blocks.band_panel``.

    `origin` is the place of the first value.
    """
    sizes = (blocks[:, 1] - blocks[:, 0]) * (blocks[:, 3] - blocks[:, 2])
    begins = origin + np.cumsum(sizes) - sizes
    cuts = np.unique(np.concatenate([[0, rows], blocks[:, 0], blocks[:, 1]]))
    tiles: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    for top, bottom in itertools.pairwise(cuts.tolist()):
        members = np.flatnonzero((blocks[:, 0] <= top) & (blocks[:, 1] > top))
        for row in range(top, bottom, TILE):
            first = len(pieces)
            for m in members:
                r0, _, c0, c1 = blocks[m]
                pieces.append((begins[m] + (row - r0) * (c1 - c0), c1 - c0, c0, c1 - c0))
            tiles.append((row, min(TILE, bottom - row), first, len(pieces)))
    return np.reshape(tiles, (-1, 4)).astype(np.int64), np.reshape(pieces, (-1, 4)).astype(np.int64)
