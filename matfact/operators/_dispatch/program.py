"""Flat programs of all factors of a product, for the fused kernels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from matfact._threads import allowed_threads
from matfact.kernels import coded, csr, fused
from matfact.kernels.blocks import TILE
from matfact.operators._dispatch import coding, cost

_HELP = 1 << 15  #: vector multiplications from which a second thread pays
_DOT_SPEED = 3  #: values of a single column that take as long as one vector multiplication
_PAIR = 16  #: entries of the largest block whose rows cost more than its values
_SMALL = 256  #: entries of the largest block that is stored side by side with others
_PIECES = 4  #: parts of a factor for each thread, so that a late one still finds work
_VECTOR_PIECES = 2  #: the same for a single column, which comes from memory in longer stretches
_CACHE_LINE = 64  #: bytes; vectors that straddle two take twice as long
_KEPT = 64  #: sizes of batches for which something is prepared, at most
_STORED = {"float16": np.float16, "bfloat16": np.int16, "int8": np.int8}
_KERNELS = {"int8": (fused.apply_codes_to_vector, fused.apply_codes_to_panels)}
_ALONE = np.zeros(fused.STATE_SIZE, np.int64)  #: what a kernel without helpers shares with them
_memory = threading.local()  #: scratch space, kept from call to call


Apply = Callable[[np.ndarray], np.ndarray]


class Program:
    """Steps in the order of their application, with all values in one array.

    Parameters
    ----------
    dtype : dtype
        float32 or float64, in which results are computed.
    stored : {"", "float16", "bfloat16", "int8"}
        What all values are if not of that dtype. bfloat16 numbers are given as their bits. Steps
        of bytes, "int8", are quantized matrices, signs, diagonals and selections.
    columns : int
        Rows of the operand.
    """

    def __init__(self, dtype: Any, stored: str, columns: int) -> None:
        self.dtype = np.dtype(dtype)
        self.stored = stored
        self.columns = columns
        self._largest = columns
        self.counts = dict.fromkeys(cost.WORK, 0) | {"row": columns}
        self._steps: list[list[int]] = []
        self._values: list[np.ndarray] = []
        self._indices: list[np.ndarray] = []
        self._table: list[np.ndarray] = []

    def add_csr(self, values: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> None:
        """Add a matrix in compressed sparse rows."""
        rows, lanes = len(indptr) - 1, fused.DOT // self.dtype.itemsize
        order = np.argsort(-np.diff(indptr), kind="stable")
        slices, ends, entries, halves = csr.arranged(indptr, order, lanes)
        place = {"TABLE": self._append(self._table, slices)}
        place["A"] = self._append(self._table, order)
        place["B"] = self._append(self._table, ends)
        place["C"] = lanes
        place["COLUMNS"] = self._append(self._indices, indices[entries])
        values = _halved(values[entries], halves, self.stored == "bfloat16")
        self._add(fused.CSR, rows, len(slices), len(slices), values, place)

    def add_kronecker(self, values: np.ndarray) -> None:
        """Add a Kronecker-sparse matrix from values of shape (a, d, b, c)."""
        a, d, b, c = values.shape
        lanes, count = fused.DOT // self.dtype.itemsize, a * d
        together = count // lanes * lanes if b * c <= _SMALL else 0
        place = {"A": a, "B": b, "C": c, "D": d, "TABLE": together}
        place["COLUMNS"] = self._append(self._indices, _places(a, c, d))
        if b != c:
            self._append(self._indices, _places(a, b, d))
        flat = np.reshape(values, (count, b * c))
        side_by_side = flat[:together].reshape(-1, lanes, b * c).swapaxes(1, 2)
        flat = np.concatenate([side_by_side.ravel(), flat[together:].ravel()])
        units = -(-count // lanes) if together else count
        self._add(fused.KRONECKER, a * b * d, count * -(-b // TILE), units, flat, place)

    def add_blocks(self, values: np.ndarray, blocks: np.ndarray, rows: int) -> None:
        """Add dense blocks, given by first and last rows and columns."""
        tiles, pieces = _bands(blocks, rows, sum(map(np.size, self._values)))
        place = {"TABLE": self._append(self._table, tiles)}
        place["A"] = self._append(self._table, pieces)
        place["B"] = place["A"] + pieces.size
        self._add(fused.BANDS, rows, len(tiles), len(tiles), values, place)

    def add_selection(self, index: np.ndarray) -> None:
        """Add a selection of rows; negative indices give zeros."""
        place = {"TABLE": self._append(self._table, index)}
        self._add(fused.SELECTION, len(index), len(index), len(index), np.zeros(0), place)

    def add_quantized(self, factor: Any) -> None:
        """Add a quantized matrix that is dense or in compressed sparse rows."""
        found = coding.slices(factor, self.dtype)
        place = {"TABLE": self._append(self._table, found.slices)}
        place["A"] = self._append(self._table, found.rows)
        place["B"] = self._append(self._table, found.parts)
        place["C"] = self._append(self._values, _bytes(found.scales))
        place["D"] = found.columns is not None
        if found.columns is not None:
            place["COLUMNS"] = self._append(self._indices, found.columns)
        n, kind = len(found.rows), "code" if place["D"] else "dense code"
        self.counts[kind] += found.integers.size
        self._add(coded.QUANTIZED, factor.shape[0], n, n, _bytes(found.integers), place)

    def add_signs(self, bits: np.ndarray, shape: tuple[int, int]) -> None:
        """Add a matrix of signs, packed as `numpy.packbits` does it."""
        words, n_words = coding.sign_words(bits, shape, self.dtype.itemsize)
        self.counts["signs"] += words.nbytes
        place, n = {"A": n_words, "B": shape[1]}, -(-shape[0] * self.dtype.itemsize // _CACHE_LINE)
        self._add(coded.SIGNS, shape[0], n, n, _bytes(words), place)

    def add_scales(self, scales: np.ndarray) -> None:
        """Add a diagonal matrix."""
        n, scales = scales.size, _bytes(np.ravel(scales).astype(self.dtype))
        self.counts["row"] += n
        self._add(coded.SCALES, n, n, n, scales, {})

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
        if kind <= fused.SELECTION:
            pair = kind == fused.KRONECKER and place["B"] * place["C"] <= _PAIR
            part = "pair" if pair else ("csr", "block", "block", "row")[kind]
            self.counts[part] += rows if kind == fused.SELECTION else values.size
        self._largest = max(self._largest, rows)

    def finish(self) -> Program:
        """Lay everything out flat; nothing can be added afterwards."""
        stored = np.dtype(_STORED.get(self.stored, self.dtype))
        values = _aligned(sum(map(np.size, self._values)), stored)
        np.concatenate([np.ravel(v) for v in self._values], out=values, casting="unsafe")
        narrow = self._largest <= 1 << 16
        indices = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, self._indices)])
        table = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, self._table)])
        self._arrays: tuple[np.ndarray, ...] = (
            np.asarray(self._steps, np.int64),
            values.view(np.uint16) if self.stored == "float16" else values,
            indices.astype(np.uint16 if narrow else np.uint32),
            table.astype(np.int64),
        )
        self.rows = self._steps[-1][fused.ROWS]
        self.counts["row"] += self.rows  # to pack and unpack
        self._n_values = sum(self.counts.values())
        if self.stored == "int8":  # which take less time each
            self._n_values = round(cost.work(self.counts, 1))
        self._values, self._indices, self._table = [], [], []
        steps, values, indices, table = self._arrays
        self._job = np.zeros(fused.COUNTERS + 2 * fused.SPACING * (len(steps) + 2), np.int64)
        self._job[: fused.TABLE_DATA + 1] = (
            steps.ctypes.data, len(steps), values.ctypes.data, indices.ctypes.data,
            table.ctypes.data,
        )  # fmt: skip
        self._calls: dict[tuple[int, bool, int], _Call] = {}
        return self

    def threads(self, batch: int) -> int:
        """Return the number of threads worth using for a batch, within the limit."""
        worth = self._worth(batch)
        return min(allowed_threads(), worth) if worth > 1 else 1

    def _worth(self, batch: int) -> int:
        """Return the number of threads worth using for a batch."""
        values = self._n_values
        if batch == 1:
            return threads_for_vector(values)
        return 1 + values * batch * self.dtype.itemsize // fused.NARROW // _HELP

    def apply(self, X: np.ndarray, threads: int | None = None) -> np.ndarray:
        """Return the product with `X`, of shape (columns,) or (columns, batch).

        The result has the memory layout of `X`.
        """
        batch = X.shape[1] if X.ndim == 2 else 1
        flags = X.flags
        by_columns = flags.fnc
        if X.dtype != self.dtype or not (by_columns or flags.c_contiguous):
            X, by_columns = np.ascontiguousarray(X, self.dtype), False
        elif not flags.writeable:
            X = X.copy("K")  # Numba has a separate type for read-only arrays
        out = np.empty((self.rows, *X.shape[1:]), self.dtype, "F" if by_columns else "C")
        if batch:
            call = self._call(batch, by_columns, threads or self.threads(batch))
            scratch = self._scratch(call.scratch)
            arrays = (*self._arrays[1:3], X.ravel("K"), out.ravel("K"), scratch)
            fused.run(call.kernel, call.number, call.job.copy(), arrays, call.threads)
        return out

    def prepared(self, shape: tuple[int, ...], threads: int | None = None) -> Apply:
        """Return a function that applies the program to operands of a shape and of its dtype.

        Equivalent to `apply`. If one thread suffices, more work is done in advance, which saves
        more than a microsecond per call.
        """
        batch = shape[1] if len(shape) == 2 else 1
        if not batch or (threads or self._worth(batch)) > 1:
            return functools.partial(self.apply, threads=threads)  # None: the limit at that time
        call, dtype, result = self._call(batch, False, 1), self.dtype, (self.rows, *shape[1:])
        kernel, job, size, scratch = call.kernel, call.job, call.scratch, self._scratch
        values, indices = self._arrays[1:3]

        def apply(X: np.ndarray) -> np.ndarray:
            flags = X.flags
            if not (flags.c_contiguous and flags.writeable):
                return self.apply(X, 1)
            out = np.empty(result, dtype)
            kernel(
                job.copy(), values, indices, X.ravel(), out.ravel(), scratch(size), _ALONE, 0, 0, 0
            )
            return out

        return apply

    def _call(self, batch: int, by_columns: bool, threads: int) -> _Call:
        """Return the preparation for batches of one size and layout."""
        key = (batch, by_columns, threads)
        if key not in self._calls:
            if len(self._calls) >= _KEPT:
                self._calls.clear()
            self._calls[key] = self._prepared(*key)
        return self._calls[key]

    def _prepared(self, batch: int, by_columns: bool, threads: int) -> _Call:
        job = self._job.copy()
        sides = self.columns, self.rows, self._largest
        shape = fit_job(job, sides, batch, by_columns, threads, self.dtype.itemsize)
        kernels = _KERNELS.get(self.stored, (fused.apply_vector, fused.apply_panels))
        kernel, operand = kernels[batch > 1], np.empty(0, self.dtype)
        number = fused.enroll(kernel, (*self._arrays[1:3], operand, operand, operand))
        return _Call(job, kernel, number, math.prod(shape), threads)

    def _scratch(self, size: int) -> np.ndarray:
        """Return uninitialized memory, valid in this thread until its next product."""
        arrays = _memory.__dict__
        memory = arrays.get(self.dtype.char)
        if memory is None or memory.size < size:
            memory = arrays[self.dtype.char] = _aligned(size, self.dtype)
        return memory


@dataclasses.dataclass(frozen=True)
class _Call:
    """Preparation for batches of one size and layout.

    `job` lacks the addresses of operands and of the scratch space, which has `scratch` entries.
    """

    job: np.ndarray
    kernel: fused.Kernel
    number: int
    scratch: int
    threads: int


def threads_for_vector(values: int) -> int:
    """Return the number of threads worth using for a single column."""
    return 1 + values // _DOT_SPEED // _HELP


def fit_job(
    job: np.ndarray,
    sides: tuple[int, int, int],
    batch: int,
    by_columns: bool,
    threads: int,
    itemsize: int,
) -> tuple[int, int]:
    """Write the sizes of operands to a job, and return the shape of its scratch space.

    Parameters
    ----------
    job : ndarray of int64
        The job of a program.
    sides : tuple of int
        Number of rows of the operand, of the result, and of the larger of both and of what
        steps hand on.
    batch : int
        Number of columns.
    by_columns : bool
        Whether operands are stored by columns.
    threads : int
        Number of threads.
    itemsize : int
        Bytes of a number.
    """
    columns, rows, largest = sides
    job[fused.ROWS_IN], job[fused.BATCH] = columns, batch
    job[fused.X_ROW], job[fused.X_COLUMN] = _strides(by_columns, columns, batch)
    job[fused.OUT_ROW], job[fused.OUT_COLUMN] = _strides(by_columns, rows, batch)
    if batch == 1:
        job[fused.PIECES] = 1 if threads == 1 else _VECTOR_PIECES * threads
        shape = 2, largest
    else:
        wide, narrow = (n // itemsize for n in (fused.WIDE, fused.NARROW))
        n_wide = (batch + wide // 2 - 1) // wide  # the rest goes into narrow panels
        n_panels = n_wide + max(0, -(-(batch - n_wide * wide) // narrow))
        whole = threads == 1 or n_panels >= 2 * threads
        pieces = 0 if whole else _PIECES * threads
        job[fused.PANELS : fused.PIECES + 1] = n_panels, n_wide, pieces
        shape = (
            min(threads, n_panels) if whole else n_panels,
            2 * largest * (wide if n_wide else narrow),
        )
    job[fused.SCRATCH_ROWS], job[fused.SCRATCH_SIZE] = shape
    return shape


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array that begins with a cache line."""
    memory = np.empty(size * dtype.itemsize + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size * dtype.itemsize].view(dtype)


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array, as many as fill cache lines."""
    content = np.ascontiguousarray(array).ravel().view(np.int8)
    return np.pad(content, (0, -content.size % _CACHE_LINE))


def _halved(values: np.ndarray, halves: np.ndarray, is_bfloat16: bool) -> np.ndarray:
    """Replace the values marked 1 or 2 by halves that add up to them."""
    if is_bfloat16:  # stored as the upper bits of float32
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    first, second = halves == 1, halves == 2
    values[first] *= 0.5
    values[second] -= 0.5 * values[second]
    return (values.view(np.uint32) >> 16).astype(np.int16) if is_bfloat16 else values


def _places(a: int, count: int, d: int) -> np.ndarray:
    """Return the first row (column) of each block of a Kronecker-sparse matrix."""
    return np.add.outer(np.arange(a) * count * d, np.arange(d)).ravel()


def _strides(by_columns: bool, rows: int, batch: int) -> tuple[int, int]:
    return (1, rows) if by_columns else (batch, 1)


def _bands(blocks: np.ndarray, rows: int, origin: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut blocks into tiles of a few rows: see ``kernels.blocks.band_panel``.

    `origin` is the position of the first value.
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
