"""Products of sparse factors with one sample, read from the memory of parameters and buffers.

Nothing is derived from the values: no copy takes memory, none has to be compared with the values in
every pass, and no write can be missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matfact._threads import allowed_threads
from matfact.operators._dispatch import cost
from matfact.operators._dispatch.plan import SMALL
from matfact.torch.layers._factors import FactorModule, SparseFactorModule

#: Dtypes of values as NumPy has them, or their bits, and those computed in.
_READ: dict[torch.dtype, tuple[Any, torch.dtype]] = {
    torch.float32: (np.float32, torch.float32),
    torch.float64: (np.float64, torch.float64),
    torch.float16: (np.uint16, torch.float32),
    torch.bfloat16: (np.int16, torch.float32),
}
_Run = Callable[[np.ndarray, np.ndarray], None]


class InPlace:
    """Prepared products with one sample. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[int, ...], _Run | None] = (), None

    def apply(self, chain: Sequence[Any], values: Sequence[Tensor], x: Tensor) -> Tensor | None:
        """Return the product with `x` in the dtype it is computed in, or None if it is slower.

        `x` holds one sample, and `chain` with the parameters `values` are `readable` for it.
        """
        addresses = (*(v.data_ptr() for v in values), *(p.data_ptr() for p in _positions(chain)))
        if self._kept[0] != addresses or not addresses:
            self._kept = addresses, _prepared(chain, values, addresses)
        _, run = self._kept
        if run is None:
            return None
        dtype = _READ[x.dtype][1]
        sample = x.reshape(-1).to(dtype).contiguous()
        out = torch.empty((*x.shape[:-1], chain[0].rows), dtype=dtype)
        run(sample.numpy(force=True), out.view(-1).numpy())
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace:
        return InPlace()

    def __reduce__(self) -> tuple[type[InPlace], tuple[()]]:
        return InPlace, ()


def readable(chain: Sequence[FactorModule], values: Sequence[Tensor], x: Tensor) -> bool:
    """Whether the kernel can read the factors, as modules and their parameters, for `x`."""
    dtype = x.dtype
    return dtype in _READ and all(
        type(module) is SparseFactorModule
        and module._buffers["indices"].dtype == torch.uint8  # type: ignore[union-attr]
        and module._buffers["indices"].is_cpu  # type: ignore[union-attr]
        and value.dtype == dtype
        and value.is_cpu
        and value.is_contiguous()
        for module, value in zip(chain, values, strict=False)
    )


def _positions(chain: Sequence[Any]) -> list[Tensor]:
    return [module._buffers[name] for name in ("indices", "indptr") for module in chain]


def _prepared(
    chain: Sequence[Any], values: Sequence[Tensor], addresses: tuple[int, ...]
) -> _Run | None:
    """Return a function that writes the product with a sample to an array.

    None if the factors are slower than the dense matrix, by the fixed rule of products. Values of
    16 bits take as long as those of 32, but their dense matrix half as long.
    """
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
    groups = [addresses[i * n : i * n + n] for i in range(3)]
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
    worth = threads_for_vector(stored)

    def run(sample: np.ndarray, out: np.ndarray) -> None:
        threads = min(worth, allowed_threads(), torch.get_num_threads())
        job = table[:size].copy()
        job[fused.PIECES] = vector_pieces(threads)
        memory = np.empty(2 * max(sides), dtype)
        fused.run(rows.apply_rows, number, job, (*empty, sample, out, memory), threads)

    return run
