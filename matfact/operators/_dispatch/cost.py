"""Fixed rule that compares the work of the factors with that of the dense matrix.

The rule measures nothing: the two ways round differently, so results must not depend on how busy
a machine was.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Batch sizes at which work was measured.
BATCHES = (1, 16, 64, 256)
#: Work per element of each part of a program, relative to a value of a dense block. Ratios of
#: kernel times on one thread of a server CPU; nearly the same for float32 and float64.
WORK = {
    "row": (2.0, 2.5, 4.0, 3.6),
    "csr": (0.9, 1.5, 2.3, 2.8),
    "pair": (0.6, 2.0, 2.0, 2.0),
    "block": (1.0, 1.0, 1.0, 1.0),
    "code": (0.8, 1.3, 2.5, 3.0),
    # From 64 columns on up to a fifth more than floats, which would need four times the memory.
    "dense code": (0.35, 0.75, 1.0, 1.0),
    "signs": (0.35, 1.4, 2.1, 3.0),  # of eight signs
}


def work(counts: Mapping[str, int], batch: int) -> float:
    """Return the work of a program with `counts` of each part, for one batch size."""
    return sum(n * float(np.interp(batch, BATCHES, WORK[kind])) for kind, n in counts.items())


def factors_pay(counts: Mapping[str, int], shape: tuple[int, int], batch: int) -> bool:
    """Whether a program takes at most the work of a dense matrix of its `shape`."""
    rows, columns = shape
    dense = {"row": rows + columns, "block": rows * columns}
    return work(counts, batch) <= work(dense, batch)
