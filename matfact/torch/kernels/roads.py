"""Rule that predicts which road a factor takes fastest on a GPU.

The rule is a pure function of shapes, so that results do not depend on how busy a device was. All
its constants stand here. Except for counts of instructions they are guesses for a data-centre GPU,
on the cautious side for sparse roads, until ``python -m benchmarks gpu`` has measured them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

#: The roads of a factor: kernels that decode tiles, or go along compressed rows; torch's products
#: with 2:4 values; cuSPARSE; and torch with the dense matrix or batched blocks.
Road = Literal["tiles", "rows", "semi-structured", "cusparse", "torch"]
#: How a factor is stored: scattered values, a dense matrix of codes, or of signs.
Kind = Literal["sparse", "codes", "signs"]

BANDWIDTH = 2.5e12  #: bytes per second
LAUNCH = 4e-6  #: seconds of each kernel on the device
#: Seconds of the host to choose and start a road. The device meanwhile works on what came before,
#: so that they count where they are longer, except in CUDA graphs.
HOST: dict[Road, float] = {
    "tiles": 5e-5, "rows": 6e-5, "semi-structured": 3e-5, "cusparse": 1e-4, "torch": 1e-5,
}  # fmt: skip
#: Seconds to compare a tensor with its copy, for which the host waits.
COMPARING = 3e-5
#: Multiplications and additions per second by tensor cores, by bytes of a number.
RATE = {2: 6e14, 4: 4e13}
INSTRUCTIONS = 2e13  #: instructions per second, each of one lane
#: Share of the bandwidth, and of the rate, that a road reaches.
REACHED: dict[str, tuple[float, float]] = {
    "dense": (0.85, 0.7),
    "tiles": (0.7, 0.3),
    "rows": (0.5, 1.0),
    "semi-structured": (0.7, 0.9),
    "cusparse": (0.25, 1.0),
    "blocks": (0.6, 0.4),
}
#: Instructions for each entry of a tile, by what is decoded, and for each value of a row. Counted
#: in code compiled for compute capability 9.0, where decoding takes longer than reading.
DECODING = {
    "sparse": 18, "sparse groups": 47, "codes": 5.5, "codes groups": 31, "signs": 11,
    "rows": 24, "rows groups": 53, "cusparse": 24,
}  # fmt: skip
#: Instructions for an entry or a value and each further sample, without tensor cores.
ADDING = {"tiles": 3, "rows": 24, "cusparse": 6}
#: Samples up to which kernels sum products without tensor cores, and that they multiply at once.
FEW, MANY = 8, 64
#: Kernels that make a stored matrix dense, and bytes for each of its values and entries.
DENSIFYING = 8, 20, 4
#: Shapes of which 2:4 products take multiples.
SEMI_STRUCTURED = 32, 64
#: Compute capability from which Triton's kernels are used.
KERNELS_FROM = 8, 0
#: Compute capabilities from the first and below the second, whose 2:4 instructions torch has.
SEMI_STRUCTURED_ON = (8, 0), (10, 0)


class Storage(NamedTuple):
    """What the rule knows of a matrix."""

    kind: Kind
    rows: int
    columns: int
    stored: int  #: values, codes or signs
    value_bytes: int  #: of each
    is_grouped: bool = False  #: whether codes of a row have several scales

    @property
    def size(self) -> int:
        """Entries of the dense matrix."""
        return self.rows * self.columns


def seconds(
    road: str, n_bytes: float, flops: float, rate: float, launches: float = 1, decoding: float = 0
) -> float:
    """Return the time of a road: that of memory or of arithmetic, whichever is longer."""
    of_bandwidth, of_rate = REACHED[road]
    arithmetic = flops / rate / of_rate + decoding / INSTRUCTIONS
    return LAUNCH * launches + max(n_bytes / BANDWIDTH / of_bandwidth, arithmetic)


def dense(rows: int, columns: int, samples: int, itemsize: int) -> float:
    """Return the time of a product with a dense matrix."""
    n_bytes = (rows * columns + samples * (rows + columns)) * itemsize
    return seconds("dense", n_bytes, 2 * samples * rows * columns, RATE[itemsize])


def densified(storage: Storage, samples: int, itemsize: int) -> float:
    """Return the time of torch, which makes a stored matrix dense for every product."""
    launches, of_values, of_entries = DENSIFYING
    n_bytes = of_values * storage.stored + of_entries * storage.size
    making = seconds("dense", n_bytes, 0, 1, launches)
    return making + dense(storage.rows, storage.columns, samples, itemsize)


@functools.lru_cache(maxsize=4096)  # calls of layers ask again and again
def times(storage: Storage, samples: int, itemsize: int) -> Mapping[Road, float]:
    """Return the predicted time of each road that any stored matrix can take."""
    found: dict[Road, float] = {"torch": densified(storage, samples, itemsize)}
    if storage.columns % 8 == 0:  # else bits of rows begin anywhere, and decoding is slow
        found["tiles"] = _tiles(storage, samples, itemsize)
    if storage.kind == "sparse":
        found["rows"] = _rows(storage, samples, itemsize, "rows")
        if storage.value_bytes == itemsize:  # no codes
            found["cusparse"] = _rows(storage, samples, itemsize, "cusparse")
    return found


def _tiles(storage: Storage, samples: int, itemsize: int) -> float:
    """Return the time of the kernel that decodes tiles."""
    uses_cores = samples > FEW
    passes = math.ceil(samples / (MANY if uses_cores else FEW))
    bits = 0 if storage.kind == "codes" else storage.size / 8
    values = 0 if storage.kind == "signs" else storage.stored * storage.value_bytes
    activations = samples * (storage.rows + storage.columns) * itemsize
    entry = DECODING[storage.kind + (" groups" if storage.is_grouped else "")]
    flops = 0
    if uses_cores:
        flops = 2 * passes * MANY * storage.size
    else:
        entry += ADDING["tiles"] * (samples - 1)
    n_bytes, decoding = passes * (bits + values) + activations, passes * entry * storage.size
    return seconds("tiles", n_bytes, flops, RATE[itemsize], decoding=decoding)


def _rows(
    storage: Storage, samples: int, itemsize: int, road: Literal["rows", "cusparse"]
) -> float:
    """Return the time of products along compressed rows."""
    index, launches = (2 if storage.columns <= 1 << 16 else 4), 1 + (samples > 1)
    if road == "cusparse":
        index, launches = 4 + 2 * index, 6  # indices are widened first
    gathered = samples * itemsize / 8  # for each value, most of it from caches
    activations = samples * (storage.rows + storage.columns) * itemsize
    n_bytes = storage.stored * (index + storage.value_bytes + gathered) + activations
    value = DECODING[road + (" groups" if storage.is_grouped else "")]
    value += ADDING[road] * (samples - 1)
    return seconds(road, n_bytes, 0, 1, launches, value * storage.stored)


def quickest(times: Mapping[Road, float]) -> Road:
    """Return the road with the least time; torch where nothing is faster."""
    road = min(times, key=lambda name: times[name])
    return road if times[road] < times["torch"] else "torch"


def semi_structured(storage: Storage, samples: int, itemsize: int) -> float:
    """Return the time of a product with a matrix of 2:4 values, compressed beforehand."""
    n_bytes = storage.size * (itemsize / 2 + 1 / 8) + samples * itemsize * (
        storage.rows + storage.columns
    )
    return seconds("semi-structured", n_bytes, samples * storage.size, RATE[itemsize])


def refuses_semi_structured(
    rows: int, columns: int, dtype: str, capability: tuple[int, int]
) -> str | None:
    """Return why torch has no product with a 2:4 matrix, or None if it has one."""
    of_rows, of_columns = SEMI_STRUCTURED
    first, end = SEMI_STRUCTURED_ON
    if dtype not in ("float16", "bfloat16"):
        return f"{dtype} is neither float16 nor bfloat16"
    if rows % of_rows or columns % of_columns:
        return f"{rows}×{columns} are not multiples of {of_rows}×{of_columns}"
    if not first <= capability < end:
        return f"no 2:4 products for compute capability {capability[0]}.{capability[1]}"
    return None


@functools.lru_cache(maxsize=4096)
def blocks(shape: tuple[int, int, int, int], samples: int, itemsize: int) -> Mapping[Road, float]:
    """Return the time of a Kronecker-sparse factor by the kernels and by batched products."""
    a, d, b, c = shape
    values, read, written = a * d * b * c, samples * a * d * c, samples * a * d * b
    uses_cores = samples > 1 and min(b, c) >= 16
    again = math.ceil(b / (64 if uses_cores else 16))
    n_bytes = itemsize * (values * math.ceil(samples / MANY) + again * read + written)
    if uses_cores:
        by_kernel = seconds("tiles", n_bytes, 2 * values * samples, RATE[itemsize])
    else:
        by_kernel = seconds("tiles", n_bytes, 0, 1, decoding=ADDING["tiles"] * values * samples)
    n_bytes, launches = itemsize * (values + read + written), 1
    if d > 1:  # features are permuted after the product, or before and after it
        n_bytes += 2 * itemsize * (written + (read if a > 1 else 0))
        launches += 2 if a > 1 else 1
    padded = max(b, 16) * max(c, 16) * a * d
    by_torch = seconds("blocks", n_bytes, 2 * padded * samples, RATE[itemsize], launches)
    return {"tiles": by_kernel, "torch": by_torch}
