"""Products of sparse factors with batches of samples, and their gradients.

Panels of samples pass through all factors forward and, with the gradients of the outputs,
backward, so that activations stay in the cache. The backward pass recomputes activations, which
is cheaper than fetching them from memory.
"""

from __future__ import annotations

import threading

import numba
import numpy as np

from matfact.kernels import panels
from matfact.kernels.atomics import pointer
from matfact.kernels.compilation import compiled
from matfact.kernels.vectors import fma, load, spread, store, total, value, width, zeros

#: Digest of the modules inlined here. Numba compiles anew when this file changes, and only then.
SOURCES = "b155567c0601eb7a"

CSR, KRONECKER, SELECTION = range(3)
#: Columns of a table of steps. ``VALUES`` to ``INDICES`` are addresses: of values and their
#: gradients, of row pointers (int64) and of column numbers (uint16), or of the selected columns
#: (int64).
KIND, ROWS, COLUMNS, VALUES, GRADIENTS, INDPTR, INDICES, A, B, C, D = range(11)
STEP_FIELDS = 11

WIDE, NARROW, SINGLE = 256, 64, 8  #: bytes of a panel's rows
_FAR = 1 << 60  #: placeholder size of arrays with bounds known otherwise
_UINT16 = np.zeros(1, np.uint16)
_memory = threading.local()  #: scratch space, kept from call to call


def forward(steps: np.ndarray, X: np.ndarray, out: np.ndarray) -> None:
    """Compute the product with samples.

    Parameters
    ----------
    steps : ndarray of int64, of shape (n_steps, STEP_FIELDS)
        The factors, in the order of their application.
    X : ndarray of shape (batch, columns)
        Samples, C-contiguous, of the dtype of the values.
    out : ndarray of shape (batch, rows)
        Written to.
    """
    _forward(steps, X, out, _scratch(steps, X))


def backward(steps: np.ndarray, X: np.ndarray, G: np.ndarray, out: np.ndarray) -> None:
    """Compute the gradients of samples from the gradients `G` of their products.

    Gradients of the values are accumulated at the addresses in ``GRADIENTS``.
    """
    _backward(steps, X, G, out, _scratch(steps, X))


def _scratch(steps: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Return scratch memory for the activations of a panel and two of their gradients."""
    sizes = [int(steps[0, COLUMNS]), *steps[:, ROWS].tolist()]
    lanes = WIDE // X.itemsize if len(X) > NARROW // X.itemsize else NARROW // X.itemsize
    nbytes = (sum(sizes) + 2 * max(sizes)) * lanes * X.itemsize
    memory = getattr(_memory, "array", None)
    if memory is None or memory.nbytes < nbytes:
        memory = np.empty(nbytes + WIDE, np.uint8)
        _memory.array = memory = memory[-memory.ctypes.data % WIDE :]
    return memory[:nbytes].view(X.dtype)


@numba.njit(inline="always")
def _array(address, like):  # type: ignore[no-untyped-def]
    return numba.carray(pointer(address, like), (_FAR,))


@numba.njit(inline="always")
def _csr(step):  # type: ignore[no-untyped-def]
    """Return row pointers and columns."""
    return _array(step[INDPTR], step), _array(step[INDICES], _UINT16)


@compiled()
def _kronecker_forward(zero, step, values, source, target):  # type: ignore[no-untyped-def]
    b, c, d = step[B], step[C], step[D]
    for block in range(step[A] * d):
        i, offset = block // d, block % d
        start, column, row = block * b * c, i * c * d + offset, i * b * d + offset
        for j in range(b):
            a = zero
            for k in range(c):
                x = load(source, column + k * d, zero)
                a = fma(spread(value(values, start + j * c + k, source), zero), x, a)
            store(target, row + j * d, a)


@compiled()
def _step_forward(zero, step, source, target):  # type: ignore[no-untyped-def]
    values = _array(step[VALUES], source)
    if step[KIND] == KRONECKER:
        _kronecker_forward(zero, step, values, source, target)
    elif step[KIND] == CSR:
        indptr, indices = _csr(step)
        for row in range(step[ROWS]):
            a = b = zero
            k, end = indptr[row], indptr[row + 1]
            while k + 1 < end:
                x, y = load(source, indices[k], zero), load(source, indices[k + 1], zero)
                a = fma(spread(value(values, k, source), zero), x, a)
                b = fma(spread(value(values, k + 1, source), zero), y, b)
                k += 2
            if k < end:
                x = load(source, indices[k], zero)
                a = fma(spread(value(values, k, source), zero), x, a)
            store(target, row, _sum(a, b, source))
    else:
        index = _array(step[INDICES], step)
        panels.select_panel(zero, index, 0, step[ROWS], source, target)


@numba.njit(inline="always")
def _sum(a, b, source):  # type: ignore[no-untyped-def]
    return fma(spread(source.dtype.type(1), a), a, b)


@compiled()
def _step_backward(zero, step, source, outer, inner):  # type: ignore[no-untyped-def]
    """Compute the gradients `inner` of activations `source` from those of the output, `outer`."""
    values, gradients = _array(step[VALUES], source), _array(step[GRADIENTS], source)
    if step[KIND] == KRONECKER:
        _kronecker_backward(zero, step, values, gradients, source, outer, inner)
        return
    for column in range(step[COLUMNS]):
        store(inner, column, zero)
    if step[KIND] == CSR:
        indptr, indices = _csr(step)
        for row in range(step[ROWS]):
            g = load(outer, row, zero)
            for k in range(indptr[row], indptr[row + 1]):
                column = indices[k]
                gradients[k] += total(fma(g, load(source, column, zero), zero))
                a = load(inner, column, zero)
                store(inner, column, fma(spread(value(values, k, source), zero), g, a))
    else:
        index = _array(step[INDICES], step)
        for row in range(step[ROWS]):
            if index[row] >= 0:
                store(inner, index[row], load(outer, row, zero))


@compiled()
def _kronecker_backward(zero, step, values, gradients, source, outer, inner):  # type: ignore[no-untyped-def]
    b, c, d = step[B], step[C], step[D]
    for block in range(step[A] * d):
        i, offset = block // d, block % d
        start, column, row = block * b * c, i * c * d + offset, i * b * d + offset
        for k in range(c):
            x, a = load(source, column + k * d, zero), zero
            for j in range(b):
                g, place = load(outer, row + j * d, zero), start + j * c + k
                gradients[place] += total(fma(g, x, zero))
                a = fma(spread(value(values, place, source), zero), g, a)
            store(inner, column + k * d, a)


@numba.njit(inline="always")
def _activations(zero, steps, X, start, count, memory):  # type: ignore[no-untyped-def]
    """Write the activations of a panel one after the other and return the start of the last."""
    columns = X.shape[1]
    lanes = width(zero)
    flat = X.reshape(-1)[start * columns :]
    panels.pack(zero, flat, 1, columns, count, 0, columns, memory)
    at = 0
    for s in range(len(steps)):
        end = at + steps[s, COLUMNS] * lanes
        _step_forward(zero, steps[s], memory[at:], memory[end:])
        at = end
    return at


@numba.njit(inline="always")
def _panel_forward(zero, steps, X, out, start, count, memory):  # type: ignore[no-untyped-def]
    at = _activations(zero, steps, X, start, count, memory)
    rows = out.shape[1]
    flat = out.reshape(-1)[start * rows :]
    panels.unpack(zero, memory[at:], 0, rows, count, flat, 1, rows)


@numba.njit(inline="always")
def _panel_backward(zero, steps, X, G, out, start, count, memory):  # type: ignore[no-untyped-def]
    at, lanes = _activations(zero, steps, X, start, count, memory), width(zero)
    rows, columns = G.shape[1], X.shape[1]
    outer = memory[at + rows * lanes :]
    widest = columns
    for s in range(len(steps)):
        widest = max(widest, steps[s, ROWS])
    inner = outer[widest * lanes :]
    panels.pack(zero, G.reshape(-1)[start * rows :], 1, rows, count, 0, rows, outer)
    for s in range(len(steps) - 1, -1, -1):
        at -= steps[s, COLUMNS] * lanes
        _step_backward(zero, steps[s], memory[at:], outer, inner)
        outer, inner = inner, outer
    flat = out.reshape(-1)[start * columns :]
    panels.unpack(zero, outer, 0, columns, count, flat, 1, columns)


@compiled()
def _forward(steps, X, out, memory):  # type: ignore[no-untyped-def]
    start = 0
    while start < len(X):
        left = len(X) - start
        if left > NARROW // X.itemsize:
            count = min(left, WIDE // X.itemsize)
            _panel_forward(zeros(X, WIDE), steps, X, out, start, count, memory)
        elif left > SINGLE // X.itemsize:
            count = left
            _panel_forward(zeros(X, NARROW), steps, X, out, start, count, memory)
        else:
            count = left
            _panel_forward(zeros(X, SINGLE), steps, X, out, start, count, memory)
        start += count


@compiled()
def _backward(steps, X, G, out, memory):  # type: ignore[no-untyped-def]
    start = 0
    while start < len(X):
        left = len(X) - start
        if left > NARROW // X.itemsize:
            count = min(left, WIDE // X.itemsize)
            _panel_backward(zeros(X, WIDE), steps, X, G, out, start, count, memory)
        elif left > SINGLE // X.itemsize:
            count = left
            _panel_backward(zeros(X, NARROW), steps, X, G, out, start, count, memory)
        else:
            count = left
            _panel_backward(zeros(X, SINGLE), steps, X, G, out, start, count, memory)
        start += count
