"""How a product is applied: fused kernels or the dense matrix, whichever is faster here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._advice import Advice
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.kernels.program import Program

_TINY = 1 << 14  #: entries of a product for which neither compiling nor measuring pays
#: Dtypes of operands that are taken as they are.
COMPUTED = frozenset(map(np.dtype, (np.float32, np.float64)))
_ROUNDS = 5  #: timings of which the fastest counts


class Plan:
    """The prepared forms of a product of real NumPy factors, each made when first needed.

    The choice between them rests on times measured on this machine. It changes results by no
    more than rounding.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        self._factors = factors
        #: Dtype that the values are computed with.
        self.dtype = np.result_type(np.float32, *(f.dtype for f in factors))
        self._entries = factors[0].shape[0] * factors[-1].shape[1]
        self._choices: dict[tuple[int, np.dtype], str] = {}
        self._programs: dict[np.dtype, Program] = {}
        self._dense: dict[np.dtype, np.ndarray] = {}

    @staticmethod
    def suits(factors: Sequence[Factor]) -> bool:
        """Whether the kernels can apply `factors`, and are worth preparing."""
        return (
            all(backend.is_numpy(f.values) for f in factors)
            and all(f.dtype in (np.float16, np.float32, np.float64) for f in factors)
            and factors[0].shape[0] * factors[-1].shape[1] > _TINY
        )

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Return the product with `X`, of shape (in,) or (in, batch), in float32 or float64."""
        if X.ndim == 1:
            return self.apply(X[:, None])[:, 0]
        dtype = self.dtype if X.dtype == self.dtype else np.result_type(self.dtype, X.dtype)
        if self._chosen(X.shape[1], dtype) == "dense":
            return self._densified(dtype) @ X
        return self._program(dtype).apply(X)

    def _chosen(self, batch: int, dtype: np.dtype) -> str:
        if (batch, dtype) not in self._choices:
            self._choices[batch, dtype] = self.advise(batch, dtype).method
        return self._choices[batch, dtype]

    def advise(self, batch: int, dtype: np.dtype) -> Advice:
        """Predict both ways from the machine's rates."""
        from matfact.kernels import cost

        rates, program = cost.rates(), self._program(dtype)
        return Advice(
            batch,
            cost.program_seconds(rates, program.counts, batch, program.threads(batch)),
            cost.dense_seconds(rates, self._entries, batch),
        )

    def _program(self, dtype: np.dtype) -> Program:
        # Imported where needed, so that products can be loaded without waiting for the compiler.
        from matfact.kernels.program import Program

        if dtype not in self._programs:
            half = all(f.dtype == np.float16 for f in self._factors)
            program = Program(dtype, half, self._factors[-1].shape[1])
            for factor in reversed(self._factors):
                factor.add_to(program)
            self._programs[dtype] = program.finish()
        return self._programs[dtype]

    def _densified(self, dtype: np.dtype) -> np.ndarray:
        if dtype not in self._dense:
            identity = np.eye(self._factors[-1].shape[1], dtype=dtype)
            self._dense[dtype] = np.ascontiguousarray(self._program(dtype).apply(identity))
        return self._dense[dtype]


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
