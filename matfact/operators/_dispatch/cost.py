"""Whether the factors of a product take less work than its dense matrix: a rule, no measurement.

What is computed must not depend on how busy a machine was when it was first asked: both ways
round differently.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Batch sizes for which work is known.
BATCHES = (1, 16, 64, 256)
#: Work of each part of a program, in that of a value of a dense block: ratios of times of the
#: kernels on one thread of a server's processor, which hardly differ between float32 and float64.
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
    """Return the work for `counts` of each part of a program, at one batch size."""
    return sum(n * float(np.interp(batch, BATCHES, WORK[kind])) for kind, n in counts.items())


def factors_pay(counts: Mapping[str, int], shape: tuple[int, int], batch: int) -> bool:
    """Whether a program takes no more work than the dense matrix of its `shape`."""
    rows, columns = shape
    dense = {"row": rows + columns, "block": rows * columns}
    return work(counts, batch) <= work(dense, batch)
