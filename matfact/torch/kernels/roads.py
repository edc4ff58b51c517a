"""Rule that predicts which road a factor takes fastest on a GPU.

The rule is a pure function of shapes, so that results do not depend on how busy a device was. All of
its constants stand here. They are guesses for a data-centre GPU, on the cautious side for sparse
roads, until ``python -m benchmarks gpu`` has measured them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

#: The roads of a factor: kernels that decode tiles, or go along compressed rows; torch's products
#: with 2:4 values; cuSPARSE; and torch with the dense matrix or batched blocks.
Road = Literal["tiles", "rows", "semi-structured", "cusparse", "torch"]
#: How a factor is stored: scattered values, a dense matrix of codes, or of signs.
Kind = Literal["sparse", "codes", "signs"]

BANDWIDTH = 2e12  #: bytes per second
LAUNCH = 4e-6  #: seconds of each kernel, which the host hands over one after the other
#: Multiplications and additions per second by tensor cores, by bytes of a number.
RATE = {2: 4e14, 4: 4e13}
SCALAR = 2e13  #: the same without tensor cores
#: Share of the bandwidth, and of the rate, that a road reaches.
REACHED: dict[str, tuple[float, float]] = {
    "dense": (0.85, 0.7),
    "tiles": (0.6, 0.15),
    "rows": (0.35, 0.2),
    "semi-structured": (0.7, 0.9),  # of the rate of dense products
    "cusparse": (0.25, 0.1),
    "blocks": (0.6, 0.4),
}
#: Samples up to which kernels sum products without tensor cores.
FEW = 8
#: Samples that a program multiplies at once; matrices are decoded again for each.
SAMPLES = 64
#: Kernels that make a stored matrix dense, and the passes over its values and its entries.
DENSIFYING = 8, 20, 2
#: Copies and kernels of batched products where features must be permuted.
PERMUTED = 2
#: Shapes of which 2:4 products take multiples, and their least samples.
SEMI_STRUCTURED = 32, 64, 16
#: Compute capabilities from the first and below the second, whose 2:4 instructions torch has.
SEMI_STRUCTURED_ON = (8, 0), (10, 0)


class Storage(NamedTuple):
    """What the rule knows of a matrix."""

    kind: Kind
    rows: int
    columns: int
    stored: int  #: values, codes or signs
    value_bytes: int  #: of each

    @property
    def size(self) -> int:
        """Entries of the dense matrix."""
        return self.rows * self.columns


def seconds(road: str, n_bytes: float, flops: float, rate: float, launches: float = 1) -> float:
    """Return the time of a road: that of memory or of arithmetic, whichever is longer."""
    of_bandwidth, of_rate = REACHED[road]
    return LAUNCH * launches + max(n_bytes / BANDWIDTH / of_bandwidth, flops / rate / of_rate)


def dense(rows: int, columns: int, samples: int, itemsize: int) -> float:
    """Return the time of a product with a dense matrix."""
    n_bytes = (rows * columns + samples * (rows + columns)) * itemsize
    return seconds("dense", n_bytes, 2 * samples * rows * columns, RATE[itemsize])


def densified(storage: Storage, samples: int, itemsize: int) -> float:
    """Return the time of torch, which makes a stored matrix dense for every product."""
    launches, of_values, of_entries = DENSIFYING
    n_bytes = of_values * storage.stored + of_entries * itemsize * storage.size
    making = seconds("dense", n_bytes, 0, 1, launches)
    return making + dense(storage.rows, storage.columns, samples, itemsize)


def times(storage: Storage, samples: int, itemsize: int) -> dict[Road, float]:
    """Return the predicted time of each road that any stored matrix can take."""
    rows, columns = storage.rows, storage.columns
    activations = samples * (rows + columns) * itemsize
    again = math.ceil(samples / (SAMPLES if samples > FEW else FEW))
    bits = 0 if storage.kind == "codes" else storage.size / 8
    values = 0 if storage.kind == "signs" else storage.stored * storage.value_bytes
    rate = RATE[itemsize] if samples > FEW else SCALAR
    flops = 2 * samples * storage.size
    found: dict[Road, float] = {
        "tiles": seconds("tiles", again * (bits + values) + activations, flops, rate),
        "torch": densified(storage, samples, itemsize),
    }
    if storage.kind == "sparse":
        flops = 2 * samples * storage.stored
        indices = storage.stored * (2 if columns <= 1 << 16 else 4)
        gathered = samples * storage.stored * itemsize / 8  # most of it from caches
        n_bytes = math.ceil(samples / 16) * (indices + values) + gathered + activations
        found["rows"] = seconds("rows", n_bytes, flops, SCALAR, 1 + (samples > 1))
        if storage.value_bytes == itemsize:  # no codes
            n_bytes = storage.stored * (itemsize + 4) + gathered + activations
            # Indices are widened first.
            found["cusparse"] = seconds("cusparse", n_bytes, flops, SCALAR, 6)
    return found


def fastest(storage: Storage, samples: int, itemsize: int) -> Road:
    """Return the road predicted to be fastest; torch where nothing is known to be faster."""
    found = times(storage, samples, itemsize)
    road = min(found, key=lambda name: found[name])
    return road if found[road] < found["torch"] else "torch"


def semi_structured(storage: Storage, samples: int, itemsize: int) -> float:
    """Return the time of a product with a matrix of 2:4 values, compressed beforehand."""
    n_bytes = storage.size * (itemsize / 2 + 1 / 8) + samples * itemsize * sum(storage[1:3])
    return seconds("semi-structured", n_bytes, samples * storage.size, RATE[itemsize])


def refuses_semi_structured(
    rows: int, columns: int, dtype: str, capability: tuple[int, int]
) -> str | None:
    """Return why torch has no product with a 2:4 matrix, or None if it has one."""
    of_rows, of_columns, _ = SEMI_STRUCTURED
    first, end = SEMI_STRUCTURED_ON
    if dtype not in ("float16", "bfloat16"):
        return f"{dtype} is neither float16 nor bfloat16"
    if rows % of_rows or columns % of_columns:
        return f"{rows}×{columns} are not multiples of {of_rows}×{of_columns}"
    if not first <= capability < end:
        return f"no 2:4 products for compute capability {capability[0]}.{capability[1]}"
    return None


def blocks(shape: tuple[int, int, int, int], samples: int, itemsize: int) -> dict[Road, float]:
    """Return the time of a Kronecker-sparse factor by the kernels and by batched products."""
    a, d, b, c = shape
    values, read, written = a * d * b * c, samples * a * d * c, samples * a * d * b
    uses_cores = samples > 1 and min(b, c) >= 16
    again = math.ceil(b / (64 if uses_cores else 16))
    n_bytes = itemsize * (values * math.ceil(samples / SAMPLES) + again * read + written)
    rate = RATE[itemsize] if uses_cores else SCALAR
    flops = 2 * values * samples
    by_kernel = seconds("tiles", n_bytes, flops, rate)
    n_bytes, launches = itemsize * (values + read + written), 1
    if d > 1:  # features are permuted before or after the product
        n_bytes += 2 * itemsize * (written + (read if a > 1 else 0))
        launches += PERMUTED if a > 1 else 1
    padded = max(b, 16) * max(c, 16) * a * d
    by_torch = seconds("blocks", n_bytes, 2 * padded * samples, RATE[itemsize], launches)
    return {"tiles": by_kernel, "torch": by_torch}
