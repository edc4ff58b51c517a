"""How a product is applied: fused kernels or the dense matrix, whichever is faster here."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._advice import Advice
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.kernels.program import Program

_TINY = 1 << 14  #: entries of a product for which neither compiling nor measuring pays
_SAVED = 1 << 19  #: multiplications that take as long as the calls for one factor
_KEPT = 64  #: shapes of operands for which it is kept what to do, at most
#: Dtypes of operands that are taken as they are.
COMPUTED = frozenset(map(np.dtype, (np.float32, np.float64, np.complex64, np.complex128)))
_STORED = COMPUTED | {np.dtype(np.float16)}  #: dtypes of NumPy values
_ROUNDS = 5  #: timings of which the fastest counts
_KERNELS = "matfact.kernels.program"
_LOADING = 0.5  #: seconds that loading the kernels and their compiler takes, about
_waited = 0.0  #: seconds that products without them have taken


class Plan:
    """The prepared forms of a product of factors on the host, each made when first needed.

    The choice between them rests on times measured on this machine. It changes results by no
    more than rounding.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        self._half = _half(factors)
        self._factors = [f.with_values(backend.host_view(f.values)) for f in factors]
        self._shape = (factors[0].shape[0], factors[-1].shape[1])
        #: Dtype that the values are computed with.
        self.dtype = np.result_type(np.float32, *(f.dtype for f in self._factors if not self._half))
        self.versions = versions(factors)
        #: What to call for operands of a shape and dtype.
        self.ways: dict[tuple[tuple[int, ...], np.dtype], Callable[[np.ndarray], np.ndarray]] = {}
        self._programs: dict[np.dtype, Program] = {}
        self._dense: dict[np.dtype, np.ndarray] = {}
        self._is_new = True

    @staticmethod
    def suits(factors: Sequence[Factor]) -> bool:
        """Whether the kernels can apply `factors`."""
        views = [backend.host_view(f.values) for f in factors]
        if _half(factors) == "bfloat16":
            is_tiny = factors[0].shape[0] * factors[-1].shape[1] <= _TINY
            return not is_tiny and all(view is not None for view in views)
        return all(view is not None and view.dtype in _STORED for view in views)

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Return the product with `X`, of shape (in,) or (in, batch), of a dtype in COMPUTED."""
        key = (X.shape, X.dtype)
        if key not in self.ways:
            dtype = np.result_type(self.dtype, X.dtype)
            if self._is_early():
                with doing_without_kernels():
                    return self._apply_factors(X, dtype)
            if len(self.ways) >= _KEPT:
                self.ways.clear()
            self.ways[key] = self._way(X, dtype)
        return self.ways[key](X)

    def _is_early(self) -> bool:
        """Whether nothing should be prepared yet."""
        if self._is_tiny:
            is_new, self._is_new = self._is_new, False
            return is_new
        return self._half != "bfloat16" and loading_is_too_early()

    def _way(self, X: np.ndarray, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
        """Return what to call for operands like `X`."""
        if dtype.kind == "c" and self.dtype.kind != "c":
            return functools.partial(self._apply_to_parts, dtype=dtype)
        batch = X.shape[1] if X.ndim == 2 else 1
        if self._is_tiny:
            if batch * self._saved > _SAVED * len(self._factors):
                return functools.partial(self._apply_factors, dtype=dtype)
        elif self.advise(batch, dtype).method == "factors":
            program = self._program(dtype)
            return program.prepared(X.shape) if X.dtype == dtype else program.apply
        return self._densified(dtype).__matmul__

    def _apply_to_parts(self, X: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the product of real factors with the real and the imaginary parts of `X`."""
        parts = np.ascontiguousarray(_columns(X), dtype).view(dtype.char.lower())
        return self.apply(parts).view(dtype).reshape(self._shape[0], *X.shape[1:])

    def _apply_factors(self, X: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the product with `X` by NumPy and SciPy."""
        result = _columns(X).astype(dtype, copy=False)
        for factor in reversed(self._factors):
            # As another factor, which keeps nothing.
            result = factor.with_values(factor.values).apply(result)
        return result if X.ndim == 2 else result[:, 0]

    @property
    def _is_tiny(self) -> bool:
        return self._shape[0] * self._shape[1] <= _TINY

    @property
    def _saved(self) -> int:
        """Multiplications that factors save for a column, if one of theirs takes twice as long."""
        return self._shape[0] * self._shape[1] - 2 * sum(factor.nnz for factor in self._factors)

    def advise(self, batch: int, dtype: np.dtype) -> Advice:
        """Predict both ways from the machine's rates, or time them where it is close."""
        if self._is_tiny:
            by_factors = functools.partial(self._apply_factors, dtype=dtype)
            return measure(by_factors, self._densified(dtype), batch)
        from matfact.kernels import cost

        return Advice(batch, *cost.choice_seconds(self._program(dtype), batch))

    def _program(self, dtype: np.dtype) -> Program:
        # Imported where needed, so that products can be loaded without waiting for the compiler.
        from matfact.kernels.program import Program

        if dtype not in self._programs:
            program = Program(dtype, self._half, self._shape[1])
            for factor in reversed(self._factors):
                factor.add_to(program)
            self._programs[dtype] = program.finish()
        return self._programs[dtype]

    def _densified(self, dtype: np.dtype) -> np.ndarray:
        if dtype not in self._dense:
            identity = np.eye(self._shape[1], dtype=dtype)
            if self._is_tiny:
                dense = self._apply_factors(identity, dtype)
            else:
                dense = self._program(dtype).apply(identity)
            self._dense[dtype] = np.ascontiguousarray(dense)
        return self._dense[dtype]


def _columns(X: np.ndarray) -> np.ndarray:
    return X if X.ndim == 2 else X[:, None]


def loading_is_too_early() -> bool:
    """Whether products have taken less time without the kernels than loading these takes.

    A process that applies a network once should not wait for a compiler, and one that applies it
    often loses no more by this than a second loading.
    """
    return _KERNELS not in sys.modules and _waited < _LOADING


@contextlib.contextmanager
def doing_without_kernels() -> Iterator[None]:
    """Count the time of a product that the kernels might have computed."""
    global _waited
    start = time.perf_counter()
    yield
    _waited += time.perf_counter() - start


def versions(factors: Sequence[Factor]) -> list[int]:
    """Return numbers that change when values are written to, where the library keeps count."""
    if backend.is_numpy(factors[0].values):
        return []
    return [backend.version(factor.values) for factor in factors]


def _half(factors: Sequence[Factor]) -> str:
    """Return the 16-bit dtype that all values have, by name, "" if there is none."""
    names = {str(dtype).rpartition(".")[2] for dtype in {factor.dtype for factor in factors}}
    return names.pop() if names in ({"float16"}, {"bfloat16"}) else ""


def measure(by_factors: Callable[[Array], Array], dense: Array, batch: int) -> Advice:
    """Time both ways of applying a product on random inputs."""
    values = np.random.RandomState(0).standard_normal((dense.shape[1], batch))
    dense = backend.compute_array(dense)
    X = backend.like(values, dense, dtype=dense.dtype)
    matmul = backend.namespace(dense).matmul
    return Advice(batch, _fastest(by_factors, X), _fastest(lambda X: matmul(dense, X), X))


def _fastest(call: Callable[[Array], Any], X: Array) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        result = call(X)
        backend.to_numpy(result[:1, :1])  # waits for devices that compute in the background
        times.append(time.perf_counter() - start)
    return min(times[1:])
