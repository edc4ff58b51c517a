"""Products of factors with samples, read from the memory of parameters and buffers.

The factors are sparse, or dense with values of a few bits.

Nothing is derived from the values: no copy takes memory, none has to be compared with the values in
every pass, and no write can be missed.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from matfact._threads import allowed_threads
from matfact.operators._dispatch import cost
from matfact.operators._dispatch.plan import SMALL
from matfact.torch.layers import _pool
from matfact.torch.layers._coded import QuantizedDenseModule, QuantizedSparseModule
from matfact.torch.layers._factors import SparseFactorModule

#: Dtypes of what is stored as NumPy has them, or their bits, and those computed in.
_READ: dict[torch.dtype, tuple[Any, torch.dtype]] = {
    torch.float32: (np.float32, torch.float32),
    torch.float64: (np.float64, torch.float64),
    torch.float16: (np.uint16, torch.float32),
    torch.bfloat16: (np.int16, torch.float32),
    torch.int8: (np.int8, torch.float32),
}
_ENOUGH = 1 << 15  #: values times panels for each thread
_DECODED = 128  #: samples from which decoding a matrix takes less than the kernels lose
_KEPT = 64  #: sizes of batches for which something is prepared, at most
_CACHE_LINE = 64
#: A tensor that kernels read: the dictionary that holds it, its name, type, dtype, address and
#: size, and how many writes torch has counted, None for values, which may change. It is not
#: referenced, so that it can be swapped, and takes no memory once a network has let it go.
_Read = tuple[dict[str, Any], str, Any, torch.dtype, int, int, int | None]


class InPlace:
    """Prepared products with samples. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: _Prepared | None = None

    def apply(self, modules: Collection[Any], x: Tensor) -> Tensor | None:
        """Return the product with the samples `x`, in the dtype it is computed in.

        None if the kernels cannot read the factors, which are given as modules, or are slower than
        the dense matrix.
        """
        dtype = x.dtype
        if len(modules) == 1:
            (module,) = modules
            if _is_decoded(module, x) and not (torch.is_grad_enabled() and _need_gradient(modules)):
                return module.decoded_linear(x)
        kept = self._kept
        # Tensors are held until the end, since other threads may replace them meanwhile.
        tensors = kept and kept.tensors(modules, dtype)
        if tensors is None:
            kept = self._kept = _Prepared.of([*modules], dtype)
            tensors = kept and kept.tensors(modules, dtype)
        if kept is None or kept.chain is None or tensors is None:
            return None
        if torch.is_grad_enabled() and _need_gradient(modules):
            return None
        return kept.chain.apply(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlace:
        return InPlace()

    def __reduce__(self) -> tuple[type[InPlace], tuple[()]]:
        return InPlace, ()


def _is_decoded(module: Any, x: Tensor) -> bool:
    """Whether a dense factor of few bits is decoded for the samples `x`, and nothing kept."""
    return (
        _is_dense(module)
        and x.numel() >= _DECODED * module.columns
        and module.decodes_rows
        and type(module._parameters.get("scales")) is nn.Parameter
        and (module.scales.dtype, module.scales.device) == (x.dtype, x.device)
    )


class _Prepared(NamedTuple):
    """The factors of a layer as they were looked at.

    It has the factors, what the scales of each are multiples of (for codes), the dtype of samples,
    what kernels read of the factors, and what applies them, if kernels can.
    """

    modules: list[Any]
    units: list[int | None]
    dtype: torch.dtype
    reads: list[_Read]
    chain: _Chain | None

    @classmethod
    def of(cls, modules: list[Any], dtype: torch.dtype) -> _Prepared | None:
        """Prepare factors; None if something is not plain, and may become so unnoticed."""
        every = [_reads(module, dtype) for module in modules]
        if not all(every):
            return None
        units = [vars(module).get("unit") for module in modules]
        addresses = [{name: address for _, name, _, _, address, *_ in reads} for reads in every]
        chain = _prepared(modules, addresses, units)
        return cls(modules, units, dtype, [read for reads in every for read in reads], chain)

    def tensors(self, modules: Collection[Any], dtype: torch.dtype) -> list[Tensor] | None:
        """Return what the kernels read, None if anything but values has changed.

        Every call needs this, and it takes longer than a small product.
        """
        if dtype is not self.dtype or [*modules] != self.modules:
            return None
        if [vars(module).get("unit") for module in modules] != self.units:
            return None
        found = []
        for held, name, kind, stored, address, size, version in self.reads:
            tensor: Any = held.get(name)
            if (
                type(tensor) is not kind
                or tensor.data_ptr() != address
                or tensor.numel() != size
                or tensor.dtype is not stored
                or not (
                    tensor.is_contiguous()
                    if version is None
                    else not tensor.is_inference() and tensor._version == version
                )
            ):
                return None
            found.append(tensor)
        return found


def _reads(module: Any, dtype: torch.dtype) -> list[_Read]:
    """Return what kernels read of a module, nothing if they cannot."""
    kind, values = type(module), module._parameters
    is_coded = kind in (QuantizedSparseModule, QuantizedDenseModule)
    trained = "scales" if is_coded else "values"
    if not (kind is SparseFactorModule or (is_coded and dtype is torch.float32)):
        return []
    if type(values.get(trained)) is not nn.Parameter or values[trained].dtype is not dtype:
        return []
    positions = [] if kind is QuantizedDenseModule else ["indices", "indptr"]
    counted = positions + ["groups"] * is_coded
    found: list[_Read] = []
    for name in [trained, *["codes"] * is_coded, *counted]:
        held = values if name is trained else module._buffers
        tensor, is_counted = held.get(name), name in counted
        if type(tensor) not in (Tensor, nn.Parameter) or not _is_in_memory(tensor):
            return []
        if name == "codes" and tensor.dtype is not torch.int8:
            return []
        # Torch counts no writes to inference tensors.
        if tensor.is_inference() if is_counted else not tensor.is_contiguous():
            return []
        version = tensor._version if is_counted else None
        place = tensor.data_ptr(), tensor.numel()
        found.append((held, name, type(tensor), tensor.dtype, *place, version))
    return found


def _is_in_memory(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are in the host's memory, as they are."""
    return tensor.is_cpu and not tensor.is_neg() and bool(tensor.data_ptr() or not tensor.numel())


def _need_gradient(modules: Collection[Any]) -> bool:
    return any(module._parameters[module.trained].requires_grad for module in modules)


def _prepared(
    modules: list[Any], addresses: list[dict[str, int]], units: list[int | None]
) -> _Chain | None:
    """Return factors that are ready to be applied, None if kernels could not read them.

    Addresses are those of each tensor by its name.
    """
    stored = modules[0].stored.dtype
    if not all(module.stored.dtype is stored and _is_readable(module) for module in modules):
        return None
    read, _ = _READ[stored]
    names = "codes" if stored is torch.int8 else "values", "indices", "indptr", "scales", "groups"
    places = np.array([[at.get(name, 0) for name in names] for at in addresses], np.int64)
    kinds = [np.dtype(kind) for kind in (read, np.uint16, np.int64, np.float32, np.int32)]
    if (places % [kind.itemsize for kind in kinds]).any():
        return None
    # Imported late, so that small layers do not load the compiler.
    from matfact.kernels import fused

    steps = np.zeros((len(modules), fused.STEP_FIELDS), np.int64)
    steps[:, fused.ROWS] = [module.rows for module in modules[::-1]]
    steps[:, fused.VECTOR_UNITS] = steps[:, fused.PANEL_UNITS] = steps[:, fused.ROWS]
    steps[:, [fused.A, fused.B]] = places[::-1, 3:]
    steps[:, fused.C] = [unit or 0 for unit in units[::-1]]
    for step, module in zip(steps, modules[::-1], strict=True):
        if _is_dense(module):
            step[fused.B], step[fused.D] = module.scales.numel() // module.rows, module.columns
    job = np.zeros(fused.COUNTERS + 2 * fused.SPACING * (len(modules) + 2), np.int64)
    job[fused.STEPS], job[fused.N_STEPS] = steps.ctypes.data, len(steps)
    fields = (fused.VALUES, fused.COLUMNS, fused.TABLE)
    bases = (fused.VALUE_DATA, fused.INDEX_DATA, fused.TABLE_DATA)
    for place, kind, field, data in zip(places.T, kinds, fields, bases, strict=False):
        job[data] = place.min()
        steps[:, field] = (place[::-1] - place.min()) // kind.itemsize
    return _Chain(steps, job, modules)


class _Chain:
    """Factors that are ready to be applied.

    Parameters
    ----------
    steps, job : ndarray of int64
        The table of steps of ``fused``, and a job that lacks operands.
    modules : list of SparseFactorModule
        The factors.
    """

    def __init__(self, steps: np.ndarray, job: np.ndarray, modules: list[Any]) -> None:
        self._steps, self._job = steps, job  # the job holds the address of the steps
        stored = modules[0].stored.dtype
        self._read, self._dtype = _READ[stored]
        self._is_half = stored.is_floating_point and stored is not self._dtype
        self._n_values = sum(module.n_values for module in modules)
        self._n_dense = sum(module.n_values for module in modules if _is_dense(module))
        columns, rows = modules[-1].columns, modules[0].rows
        self._sides = columns, rows, max(columns, *(module.rows for module in modules))
        self._calls: dict[tuple[int, int], _Call | None] = {}

    def apply(self, x: Tensor) -> Tensor | None:
        """Return the products with samples, or None if the dense matrix is faster."""
        columns, rows = self._sides[:2]
        key = x.numel() // columns, min(allowed_threads(), torch.get_num_threads())
        call = self._calls[key] if key in self._calls else self._called(*key)
        if call is None:
            return None
        if self._is_half:
            x = x.to(self._dtype)
        if x.is_neg():  # negated lazily
            x = x.resolve_neg()
        if not x.is_contiguous():
            x = x.contiguous()
        if not x.data_ptr():  # its memory is freed, or only imagined
            return None
        out = torch.empty((*x.shape[:-1], rows), dtype=self._dtype, device=x.device)
        call.run(call.job(x.data_ptr(), out.data_ptr()))
        return out

    def _called(self, n_samples: int, threads: int) -> _Call | None:
        """Prepare and keep what applies the factors to so many samples."""
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        call = self._prepared(n_samples, threads) if self._pays(n_samples) else None
        self._calls[n_samples, threads] = call
        return call

    def _pays(self, n_samples: int) -> bool:
        """Whether the factors are faster than the dense matrix, by the fixed rule of products.

        Values of 16 bits take as long as those of 32. Their dense matrix takes half as long with
        one sample, and less with several.
        """
        columns, rows, largest = self._sides
        n_sparse = self._n_values - self._n_dense
        has_one_only = self._is_half or (self._n_dense and n_sparse)
        if largest <= SMALL or (has_one_only and n_samples > 1):
            return False
        counts = {
            "csr": n_sparse * (1 + self._is_half), "dense code": self._n_dense,
            "row": rows + columns,
        }  # fmt: skip
        return cost.factors_pay(counts, (rows, columns), n_samples)

    def _prepared(self, n_samples: int, threads: int) -> _Call:
        # Imported late, so that small layers do not load the compiler.
        from matfact.kernels import fused, rows
        from matfact.operators._dispatch.program import fit_job

        itemsize, is_dense = self._dtype.itemsize, self._n_dense == self._n_values
        panels = -(-n_samples * itemsize // fused.NARROW)
        threads = min(threads, 1 + self._n_values * panels // _ENOUGH)
        job, steps, sides, columns = self._job.copy(), self._steps, self._sides, n_samples
        if is_dense and n_samples > 1:  # as a single column, with all samples
            steps, sides, columns = steps.copy(), tuple(n * n_samples for n in sides), 1
            steps[:, fused.PANEL_UNITS], job[fused.STEPS] = n_samples, steps.ctypes.data
        scratch = fit_job(job, sides, columns, True, threads, itemsize)
        places = fused.X_DATA, fused.OUT_DATA, fused.SCRATCH
        run = _pool.runner(rows.kernel(self._read, n_samples == 1, is_dense), threads)
        return _Call(run, job.tobytes(), places, math.prod(scratch) * itemsize, steps)


class _Call(NamedTuple):
    """What applies factors to samples of some number.

    Attributes
    ----------
    run : callable
        Runs a job.
    content : bytes
        A job that lacks operands.
    places : tuple of int
        Where the addresses of operands, results and scratch space belong in it.
    scratch : int
        Bytes of scratch space.
    steps : ndarray of int64
        The steps, whose address the job has.
    """

    run: Callable[[Any], None]
    content: bytes
    places: tuple[int, int, int]
    scratch: int
    steps: np.ndarray

    def job(self, x: int, out: int) -> ctypes.Array[ctypes.c_int64]:
        """Return the job for operands and results at these addresses."""
        job = (ctypes.c_int64 * (len(self.content) // 8)).from_buffer_copy(self.content)
        job[self.places[0]], job[self.places[1]] = x, out
        job[self.places[2]] = _scratch(self.scratch)
        return job


class _Memory(threading.local):
    """Scratch space of a thread, valid until its next product."""

    address = size = 0


_memory = _Memory()


def _scratch(size: int) -> int:
    """Return the address of as many bytes, at the beginning of a cache line."""
    if _memory.size < size:
        _memory.held = np.empty(size + _CACHE_LINE, np.uint8)
        start = _memory.held.ctypes.data
        _memory.address, _memory.size = start + -start % _CACHE_LINE, size
    return _memory.address


def _is_readable(module: Any) -> bool:
    """Whether a module is on the host, and kernels would read only where there is something."""
    stored = module.stored
    if stored.dtype not in _READ:
        return False
    if stored.dtype is torch.int8 and not _are_groups(module):
        return False
    if _is_dense(module):
        return bool(stored.shape == (module.rows, module.columns) and stored.numel())
    if module.indices.dtype is not torch.uint8:
        return False
    columns = module.indices.numpy(force=True).reshape(-1).view("<u2")
    return (
        bool((columns < module.columns).all())
        and len(columns) == stored.numel()
        and _are_bounds(module.indptr, module.rows, stored.numel())
    )


def _is_dense(module: Any) -> bool:
    return type(module) is QuantizedDenseModule


def are_dense_codes(modules: Collection[Any]) -> bool:
    """Whether all factors are dense with values of a few bits, which are best read in place."""
    return all(map(_is_dense, modules))


def _are_groups(module: Any) -> bool:
    """Whether the values of each row have groups, all rows of a dense factor as many."""
    groups, n_scales = module.groups, module.scales.numel()
    if _is_dense(module):
        counts = np.diff(groups.numpy(force=True))
        is_same = counts.size > 0 and counts.min() == counts.max() > 0
        return bool(is_same) and _are_bounds(groups, module.rows, n_scales)
    return groups.dtype is torch.int32 and _are_bounds(groups, module.rows, n_scales)


def _are_bounds(bounds: Tensor, count: int, total: int) -> bool:
    """Whether these are the bounds of so many consecutive parts of a sequence."""
    found = bounds.numpy(force=True)
    rises = len(found) == count + 1 and (np.diff(found) >= 0).all()
    return bool(rises and found[0] == 0 and found[-1] == total)
