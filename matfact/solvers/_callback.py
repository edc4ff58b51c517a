"""Progress callbacks of solvers."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Called after each iteration with its number (from 1) and the objective; may raise to stop.
Callback = Callable[[int, float], None]


class History:
    """Callback that records the objective and the seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.objective: list[float] = []
        self.seconds: list[float] = []

    def __call__(self, iteration: int, objective: float) -> None:
        """Record one iteration."""
        self.objective.append(float(objective))
        self.seconds.append(time.perf_counter() - self._start)

    def as_dict(self) -> dict[str, list[float]]:
        """Return the record, one entry per iteration."""
        return {"objective": self.objective, "seconds": self.seconds}
