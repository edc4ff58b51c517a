"""Which way to apply a product is the faster one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from matfact import backend
from matfact.backend import Array

_ROUNDS = 5  #: timings of which the fastest counts


class Advice(NamedTuple):
    """How long a product with a batch takes by its factors and by the dense matrix.

    Parameters
    ----------
    batch_size : int
        Columns of the operand.
    factors_seconds : float
        Time by the factors.
    dense_seconds : float
        Time by the dense matrix.
    """

    batch_size: int
    factors_seconds: float
    dense_seconds: float

    @property
    def method(self) -> str:
        """The faster way, ``"factors"`` or ``"dense"``."""
        return "factors" if self.factors_seconds <= self.dense_seconds else "dense"

    @property
    def seconds(self) -> float:
        """Time of the faster way."""
        return min(self.factors_seconds, self.dense_seconds)

    @property
    def speedup(self) -> float:
        """Time by the dense matrix ÷ time by the factors: below 1, factors do not pay."""
        return self.dense_seconds / self.factors_seconds

    def __repr__(self) -> str:
        verdict = "use the factors" if self.method == "factors" else "use dense"
        return (
            f"{verdict}: at batch size {self.batch_size} the factors take "
            f"{self.factors_seconds * 1e6:.3g} µs, the dense matrix "
            f"{self.dense_seconds * 1e6:.3g} µs ({self.speedup:.2g}× speed-up)"
        )


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
