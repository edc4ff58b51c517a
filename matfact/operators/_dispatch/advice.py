"""Timing of the two ways to apply a product."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from matfact import backend
from matfact.backend import Array

Method = Literal["factors", "dense"]

_ROUNDS = 5  #: number of timings; the fastest counts


class Advice(NamedTuple):
    """Times to apply a product to a batch by its factors and by its dense matrix.

    Attributes
    ----------
    batch_size : int
        Columns of the operand.
    factors_seconds : float
        Time with the factors.
    dense_seconds : float
        Time with the dense matrix.
    rule : {"factors", "dense"} or None
        What ``@`` uses if the product is not tuned. None if nothing was tuned.
    """

    batch_size: int
    factors_seconds: float
    dense_seconds: float
    rule: Method | None = None

    @property
    def method(self) -> Method:
        """The faster method, ``"factors"`` or ``"dense"``."""
        return "factors" if self.factors_seconds <= self.dense_seconds else "dense"

    @property
    def seconds(self) -> float:
        """Time of the faster method."""
        return min(self.factors_seconds, self.dense_seconds)

    @property
    def speedup(self) -> float:
        """Dense time ÷ time with the factors; below 1 the factors are slower."""
        return self.dense_seconds / self.factors_seconds

    @property
    def changed(self) -> bool:
        """Whether tuning changed what ``@`` uses."""
        return self.rule not in (None, self.method)

    def __repr__(self) -> str:
        names = {"factors": "the factors", "dense": "dense"}
        text = (
            f"use {names[self.method]}: at batch size {self.batch_size} the factors take "
            f"{self.factors_seconds * 1e6:.3g} µs, the dense matrix "
            f"{self.dense_seconds * 1e6:.3g} µs ({self.speedup:.2g}× speed-up)"
        )
        if self.rule is None:
            return text
        return f"{text}; {'changed from' if self.changed else 'as'} the rule: {names[self.rule]}"


def operand(columns: int, batch: int, like: Array, dtype: Any) -> Array:
    """Return a random operand for timings, from the library of `like`."""
    values = np.random.RandomState(0).standard_normal((columns, batch))
    return backend.like(values, like, dtype=dtype)


def measure(
    by_factors: Callable[[Array], Array], by_dense: Callable[[Array], Array], X: Array
) -> Advice:
    """Time both ways to apply a product to `X`."""
    return Advice(int(X.shape[1]), _fastest(by_factors, X), _fastest(by_dense, X))


def _fastest(call: Callable[[Array], Any], X: Array) -> float:
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        result = call(X)
        backend.to_numpy(result[:1, :1])  # waits for asynchronous devices
        times.append(time.perf_counter() - start)
    return min(times[1:])
