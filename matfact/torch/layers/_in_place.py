"""Products of sparse factors with one sample, read from the memory of parameters and buffers.

Nothing is derived from the values: no copy takes memory, none has to be compared with the values in
every pass, and no write can be missed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matfact._threads import allowed_threads
from matfact.operators._dispatch import cost
from matfact.operators._dispatch.plan import SMALL
from matfact.torch.layers._factors import SparseFactorModule

#: Dtypes of values as NumPy has them, or their bits, and those computed in.
_READ: dict[torch.dtype, tuple[Any, torch.dtype]] = {
    torch.float32: (np.float32, torch.float32),
    torch.float64: (np.float64, torch.float64),
    torch.float16: (np.uint16, torch.float32),
    torch.bfloat16: (np.int16, torch.float32),
}
#: Numbers that tell the state of a factor.
_STATE = 6
_Run = Callable[[np.ndarray, torch.Size], np.ndarray]


class InPlace:
    """Prepared products with one sample. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[int, ...], _Run | None] = (), None

    def apply(self, modules: Collection[Any], x: Tensor) -> Tensor | None:
        """Return the product with the sample `x`, in the dtype it is computed in.

        None if the kernel cannot read the factors, which are given as modules, or is slower than
        the dense matrix.
        """
        addresses = _addresses(modules, x.dtype)
        if addresses is None:
            return None
        if self._kept[0] != addresses:
            self._kept = addresses, _prepared(list(modules), addresses)
        _, run = self._kept
        if run is None:
            return None
        sample = x.to(_READ[x.dtype][1]).numpy(force=True).reshape(-1)
        return torch.from_numpy(run(sample, x.shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace:
        return InPlace()

    def __reduce__(self) -> tuple[type[InPlace], tuple[()]]:
        return InPlace, ()


def _addresses(modules: Iterable[Any], dtype: torch.dtype) -> tuple[int, ...] | None:
    """Return where values, columns and row pointers are, their state, and the dtype.

    None if any are not plain parameters and buffers of the host, with values of the given dtype.
    """
    if dtype not in _READ:
        return None
    needs_gradient, found = torch.is_grad_enabled(), [id(dtype)]
    for module in modules:
        if type(module) is not SparseFactorModule:
            return None
        value, held = module._parameters.get("values"), module._buffers
        columns: Any = held["indices"]
        if (
            type(value) is not nn.Parameter
            or value.dtype is not dtype
            or not (value.is_cpu and value.is_contiguous())
            or (needs_gradient and value.requires_grad)
            or columns.dtype is not torch.uint8
        ):
            return None
        pointers: Any = held["indptr"]
        if columns.is_inference() or pointers.is_inference():  # whose writes are not counted
            return None
        found += value.data_ptr(), columns.data_ptr(), pointers.data_ptr(), value.numel()
        found += columns._version, pointers._version
    return tuple(found)


def _prepared(chain: list[Any], addresses: tuple[int, ...]) -> _Run | None:
    """Return a function from a sample, and the shape it had, to the product.

    None if positions lie outside of the factors, or they are slower than the dense matrix by the
    fixed rule of products. Values of 16 bits take as long as those of 32, but their dense matrix
    half as long.
    """
    values = [module.values for module in chain]
    shape, stored = (chain[0].rows, chain[-1].columns), sum(value.numel() for value in values)
    sides = [*shape, *(module.rows for module in chain)]
    counts = {"csr": stored * (4 // min(4, values[0].itemsize)), "row": sum(shape)}
    if max(sides) <= SMALL or not cost.factors_pay(counts, shape, 1):
        return None
    # Imported late, so that small layers do not load the compiler.
    from matfact.kernels import fused, rows
    from matfact.operators._dispatch.program import threads_for_vector, vector_pieces

    read, computed = _READ[values[0].dtype]
    dtype = np.dtype(str(computed).removeprefix("torch."))
    n, kinds = len(chain), (np.dtype(read), np.dtype(np.uint16), np.dtype(np.int64))
    groups = [addresses[i::_STATE] for i in (1, 2, 3)]
    if not all(map(_is_sound, chain)):
        return None
    if any(a % kind.itemsize for group, kind in zip(groups, kinds, strict=True) for a in group):
        return None
    size = fused.COUNTERS + 2 * fused.SPACING * n
    table = np.zeros(size + n * fused.STEP_FIELDS, np.int64)
    steps = table[size:].reshape(n, -1)  # in memory that lives as long as the table
    steps[:, fused.ROWS] = steps[:, fused.VECTOR_UNITS] = [module.rows for module in chain[::-1]]
    table[fused.STEPS], table[fused.N_STEPS] = steps.ctypes.data, n
    fields = (fused.VALUES, fused.COLUMNS, fused.TABLE)
    bases = (fused.VALUE_DATA, fused.INDEX_DATA, fused.TABLE_DATA)
    for group, kind, field, data in zip(groups, kinds, fields, bases, strict=True):
        table[data] = min(group)
        steps[:, field] = [(address - min(group)) // kind.itemsize for address in group[::-1]]
    table[fused.SCRATCH_ROWS], table[fused.SCRATCH_SIZE] = 2, max(sides)
    empty = (np.empty(0, read), np.empty(0, np.uint16))
    number = fused.enroll(rows.apply_rows, (*empty, *[np.empty(0, dtype)] * 3))
    worth, largest, rows_out = threads_for_vector(stored), max(sides), shape[0]

    def run(sample: np.ndarray, shape: torch.Size) -> np.ndarray:
        threads = 1 if worth == 1 else min(worth, allowed_threads(), torch.get_num_threads())
        job, out = table[:size].copy(), np.empty((*shape[:-1], rows_out), dtype)
        job[fused.PIECES] = vector_pieces(threads)
        arrays = (*empty, sample, out.reshape(-1), np.empty(2 * largest, dtype))
        fused.run(rows.apply_rows, number, job, arrays, threads)
        return out

    return run


def _is_sound(module: Any) -> bool:
    """Whether the kernel would read values and samples only where there are some."""
    columns = module.indices.numpy(force=True).reshape(-1).view("<u2")
    pointers, n = module.indptr.numpy(force=True), module.values.numel()
    return bool(
        len(columns) == n
        and (columns < module.columns).all()
        and len(pointers) == module.rows + 1
        and pointers[0] == 0
        and pointers[-1] == n
        and (np.diff(pointers) >= 0).all()
    )
