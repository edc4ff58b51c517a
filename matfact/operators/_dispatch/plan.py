"""Choice between factors and dense matrix, by a fixed rule or by tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, get_args

import numpy as np

from matfact import backend
from matfact.operators._dense import DenseFactor
from matfact.operators._dispatch.advice import Advice, Method, measure, operand
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program

Apply = Callable[[np.ndarray], np.ndarray]
K = TypeVar("K")
V = TypeVar("V")

#: Largest side of factors for which compiling does not pay. BLAS splits only longer sums between
#: threads, so up to this size its results do not depend on the number of threads.
SMALL = 128
_SAVED = 1 << 19  #: multiplications that take as long as the call overhead of one factor
_KEPT = 64  #: maximum number of operand shapes for which the choice is cached
#: Dtypes of operands that need no conversion.
COMPUTED = frozenset(map(np.dtype, (np.float32, np.float64, np.complex64, np.complex128)))
_STORED = COMPUTED | {np.dtype(np.float16)}  #: dtypes of NumPy values


class Plan:
    """Prepared forms of a product on the host, each created when first needed.

    Unless the product was tuned, the form used depends only on factors, shapes and dtypes. No form
    depends on the number of threads, so results are bit-identical in every call and process.

    Parameters
    ----------
    factors : sequence of Factor
        Factors that this `suits`.
    tuned : dict of int to {"factors", "dense"}
        Methods that override the rule, by the number of columns; `tune` writes to it.
    """

    def __init__(self, factors: Sequence[Factor], tuned: dict[int, Method]) -> None:
        self.versions = versions(factors)
        self._half = _half(factors)
        if self._half and any(factor.is_coded for factor in factors):  # few numbers have 16 bits
            single = backend.namespace(factors[0].numbers).float32
            factors, self._half = [factor.astype(single) for factor in factors], ""
        self._factors = [f.on_host() for f in factors]
        self._tuned = tuned
        self._shape = (factors[0].shape[0], factors[-1].shape[1])
        #: Dtype used for computing.
        self.dtype = np.result_type(np.float32, *(f.dtype for f in self._factors if not self._half))
        #: What to call for operands of a shape and dtype.
        self.ways: dict[tuple[tuple[int, ...], np.dtype], Apply] = {}
        self._methods: dict[tuple[int, np.dtype], Method] = {}
        self._programs: dict[np.dtype, Program] = {}
        self._dense: dict[np.dtype, np.ndarray] = {}
        self._dense_programs: dict[np.dtype, Program] = {}

    @staticmethod
    def suits(factors: Sequence[Factor]) -> bool:
        """Whether NumPy or the kernels can apply `factors`."""
        if any(backend.host_view(f.values) is None for f in factors):
            return False
        views = [backend.host_view(f.numbers) for f in factors]
        if _half(factors) == "bfloat16":
            return all(view is not None for view in views)
        return all(view is not None and view.dtype in _STORED for view in views)

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Return the product with `X`, of shape (in,) or (in, batch) and a dtype in COMPUTED."""
        key, ways = (X.shape, X.dtype), self.ways  # a local reference, since tuning replaces it
        way = ways.get(key)
        if way is None:
            way = self._way(X, np.result_type(self.dtype, X.dtype))
            _keep(ways, key, way)
        return way(X)

    def _way(self, X: np.ndarray, dtype: np.dtype) -> Apply:
        """Return the function to call for operands like `X`."""
        if dtype.kind == "c" and self.dtype.kind != "c":
            return functools.partial(self._apply_to_parts, dtype=dtype)
        return self._by(self.method(X.shape[1] if X.ndim == 2 else 1, dtype), X, dtype)

    def method(self, batch: int, dtype: np.dtype) -> Method:
        """Return the method for operands with `batch_size` columns."""
        key, methods = (batch, dtype), self._methods
        method = methods.get(key)
        if method is None:
            method = self._tuned.get(batch) or self.rule(batch, dtype)
            _keep(methods, key, method)
        return method

    def rule(self, batch: int, dtype: np.dtype) -> Method:
        """Return the method without tuning."""
        if self._is_small:
            pays = batch * self._saved > _SAVED * len(self._factors)
        else:
            # Imported late, so that products load without the compiler.
            from matfact.operators._dispatch import cost

            pays = cost.factors_pay(self._program(dtype).counts, self._shape, batch)
        return "factors" if pays else "dense"

    def _by(self, method: Method, X: np.ndarray, dtype: np.dtype) -> Apply:
        """Return the function that multiplies operands like `X` by the given method."""
        if self._is_small:
            if method == "factors":
                return functools.partial(self._apply_factors, dtype=dtype)
            return self._small_dense(dtype).__matmul__
        program = self._program(dtype) if method == "factors" else self._dense_program(dtype)
        return program.prepared(X.shape) if X.dtype == dtype else program.apply

    def _apply_to_parts(self, X: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Apply real factors to the real and imaginary parts of `X`."""
        parts = np.ascontiguousarray(_columns(X), dtype).view(dtype.char.lower())
        return self.apply(parts).view(dtype).reshape(self._shape[0], *X.shape[1:])

    def _apply_factors(self, X: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the product with `X` by NumPy and SciPy."""
        result = _columns(X).astype(dtype, copy=False)
        for factor in reversed(self._factors):
            factor = factor.decoded()  # As another factor, which keeps nothing.
            result = factor.with_values(factor.values).apply(result)
        return result if X.ndim == 2 else result[:, 0]

    @functools.cached_property
    def _is_small(self) -> bool:
        """Whether NumPy and SciPy are fast enough and bit-reproducible."""
        shortest = 2 if self.dtype.kind == "c" else 1  # BLAS treats complex rows as vectors
        sides = [self._shape[0], *(factor.shape[1] for factor in self._factors)]
        return self._half != "bfloat16" and shortest <= min(sides) and max(sides) <= SMALL

    @property
    def _saved(self) -> int:
        """Multiplications saved per column, if one in a factor takes twice as long."""
        return self._shape[0] * self._shape[1] - 2 * sum(factor.nnz for factor in self._factors)

    def advise(self, batch: int) -> Advice:
        """Time the factors and NumPy's product with the dense matrix."""
        X = self._operand(batch)
        return measure(
            self._by("factors", X, self.dtype), self._densified(self.dtype).__matmul__, X
        )

    def tune(self, batch: int) -> Advice:
        """Time both methods for operands with `batch_size` columns and keep the faster."""
        X = self._operand(batch)
        by_factors, by_dense = (self._by(way, X, self.dtype) for way in get_args(Method))
        advice = measure(by_factors, by_dense, X)._replace(rule=self.rule(batch, self.dtype))
        self._tuned[batch] = advice.method
        self.ways, self._methods = {}, {}
        if advice.method == "factors":  # the dense matrix may have been made only for this
            self._dense, self._dense_programs = {}, {}
        return advice

    def _operand(self, batch: int) -> np.ndarray:
        return operand(self._shape[1], batch, np.zeros(0), self.dtype)

    def _program(self, dtype: np.dtype) -> Program:
        from matfact.operators._dispatch.program import Program

        if dtype not in self._programs:
            stored = "int8" if self._reads_codes(dtype) else self._half
            program = Program(dtype, stored, self._shape[1])
            for factor in reversed(self._factors):
                factor.add_to(program)
            self._programs[dtype] = program.finish()
        return self._programs[dtype]

    def _reads_codes(self, dtype: np.dtype) -> bool:
        """Whether the kernels read quantized values and signs as they are stored."""
        has_codes = dtype.kind == "f" and any(factor.is_coded for factor in self._factors)
        if not has_codes:
            return False
        from matfact.operators._dispatch import coding

        return all(factor.suits_bytes() or coding.pays(factor) for factor in self._factors)

    def _dense_program(self, dtype: np.dtype) -> Program:
        """Return the program of the dense matrix.

        It is as fast as BLAS, but its results do not depend on the number of threads.
        """
        from matfact.operators._dispatch.program import Program

        if dtype not in self._dense_programs:
            program = Program(dtype, "", self._shape[1])
            DenseFactor(self._densified(dtype)).add_to(program)
            self._dense_programs[dtype] = program.finish()
        return self._dense_programs[dtype]

    def _small_dense(self, dtype: np.dtype) -> np.ndarray:
        if dtype not in self._dense:
            self._dense[dtype] = self._densified(dtype)
        return self._dense[dtype]

    def _densified(self, dtype: np.dtype) -> np.ndarray:
        """Return the dense matrix, computed a few columns at a time."""
        columns = self._shape[1]
        dense = np.empty(self._shape, dtype)
        for part in backend.slabs(columns):
            units = np.zeros((columns, part.stop - part.start), dtype)
            np.fill_diagonal(units[part], 1)
            if self._is_small:
                dense[:, part] = self._apply_factors(units, dtype)
            else:
                dense[:, part] = self._program(dtype).apply(units)
        return dense


def _keep(kept: dict[K, V], key: K, value: V) -> None:
    """Cache a value; empty the cache first if it is full."""
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def _columns(X: np.ndarray) -> np.ndarray:
    return X if X.ndim == 2 else X[:, None]


def versions(factors: Sequence[Factor]) -> list[int]:
    """Return version counters of the values, for libraries that have them."""
    if backend.is_numpy(factors[0].values):
        return []
    return [backend.version(array) for f in factors for array in (f.values, f.numbers)]


def _half(factors: Sequence[Factor]) -> str:
    """Return the name of the 16-bit dtype of all values, or ""."""
    names = {str(dtype).rpartition(".")[2] for dtype in {factor.dtype for factor in factors}}
    return names.pop() if names in ({"float16"}, {"bfloat16"}) else ""
