"""How long products take on this machine: rates measured once, kept in the user's cache.

Rates are seconds for one stored value (or one row) of 32 bits and a whole batch, for a few batch
sizes, on one thread and on all. Longer numbers are taken to need as much more as they are longer.
The weights measured rotate, so that they come from memory as those of a network's layers do. Where
the times predicted from them are close, products are timed themselves.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from matfact._threads import max_threads
from matfact.kernels.measured import recall
from matfact.kernels.program import Program

Rates = dict[str, list[float]]

PARTS = ("call", "row", "csr", "pair", "block")  #: what a program consists of
SHARED = {kind: f"shared {kind}" for kind in PARTS}  #: the same on all threads
KINDS = ("dense", "small dense", *PARTS, *SHARED.values())  #: what has a rate
BATCHES = (1, 2, 4, 16, 64, 256)  #: batch sizes at which rates are measured
_SIDE, _SMALL = 1024, 256  #: of the matrices measured
_LAYERS = 12  #: whose dense weights exceed most caches
_TINY = 200  #: programs that do nothing, so many that what each needs is not at hand
_MEMORY = 64 << 20  #: bytes of dense weights to rotate over where a product is timed itself
_COPIES = 64  #: of small products, at most
_ROUNDS = 3  #: measurements of all rates, of which the fastest count
_AGREEMENT = 1.25  #: ratio of the two fastest rounds up to which a rate was measured undisturbed
_CLOSE = 2.0  #: ratio of predicted times up to which the prediction decides nothing
_SHORT = 1e-5  #: seconds by which a call that follows other work can be slower than its rate
_SETTLE = 0.15  #: seconds, after which the threads of BLAS have gone to sleep
_PATIENCE = 0.01  #: seconds for one rate, and a rotation more


def program_seconds(rates: Rates, counts: dict[str, int], batch: int, threads: int) -> float:
    """Return the time for `counts` of each part of a program at one batch size."""
    kinds = SHARED if threads > 1 else {kind: kind for kind in PARTS}
    return sum(count * _rate(rates, kinds[kind], batch) for kind, count in counts.items())


def dense_seconds(rates: Rates, entries: int, batch: int) -> float:
    """Return the time for a dense matrix of so many entries."""
    position = math.log(entries / _SMALL**2) / math.log(_SIDE**2 / _SMALL**2)
    share = min(max(position, 0.0), 1.0)
    small, large = (_rate(rates, kind, batch) for kind in ("small dense", "dense"))
    return entries * (small + share * (large - small))


def _rate(rates: Rates, kind: str, batch: int) -> float:
    batch = max(1, batch)
    scale = max(1.0, batch / BATCHES[-1])  # beyond what was measured, time is proportional
    return scale * float(np.interp(batch, BATCHES, rates[kind]))


@functools.cache
def rates() -> Rates:
    """Return this machine's rates, measured at the first call if no earlier process did."""
    return recall("rates", _fastest_rates, _is_complete)


def _fastest_rates() -> tuple[Rates, bool]:
    """Return the fastest of some rounds, and whether these were alike."""
    rounds = [measure() for _ in range(_ROUNDS)]
    fastest = {kind: np.min([r[kind] for r in rounds], axis=0).tolist() for kind in KINDS}
    return fastest, _agree(rounds)


def _agree(rounds: list[Rates]) -> bool:
    """Whether most rates were the same in two rounds."""
    totals = np.sort([[sum(r[kind]) for kind in KINDS] for r in rounds], axis=0)
    return float(np.mean(totals[1] <= _AGREEMENT * totals[0])) > 0.75


def choice_seconds(program: Program, batch: int) -> tuple[float, float]:
    """Return the times by a program and by the dense matrix.

    They are predicted where that is clear enough, and measured otherwise: once on a machine for
    all programs that consist of about the same numbers of parts, and for about the same batch.
    """
    known, entries = rates(), program.rows * program.columns
    threads, width = program.threads(batch), program.dtype.itemsize / np.float32().itemsize
    times = (
        width * program_seconds(known, program.counts, batch, threads),
        width * dense_seconds(known, entries, batch),
    )
    if max(times) > _CLOSE * min(times) + _SHORT:
        return times
    batch = _rounded(batch)
    counts = ", ".join(f"{_rounded(count)} {kind}" for kind, count in program.counts.items())
    name = f"{program.rows}×{program.columns}×{batch} {program.dtype}, {threads} threads, {counts}"
    ours, dense = recall(name, lambda: _time_both(program, batch, threads), _is_pair)
    return ours, dense


def _rounded(number: int) -> int:
    """Return the next number, upwards, that has three significant bits."""
    unit = 1 << max(0, number.bit_length() - 3)
    return -(-number // unit) * unit


def _time_both(program: Program, batch: int, threads: int) -> tuple[tuple[float, float], bool]:
    """Return the fastest times by a program and by the dense matrix, and whether rounds agree."""
    shape, dtype = (program.rows, program.columns), program.dtype
    layers = min(_COPIES, max(1, _MEMORY // (math.prod(shape) * dtype.itemsize)))
    if threads > 1:
        time.sleep(_SETTLE)
    programs = [program.copy().prepared((shape[1], batch), threads) for _ in range(layers)]
    matrices = [w.__matmul__ for w in np.ones((layers, *shape), dtype)]
    rounds = np.sort(
        [
            [_seconds(program.columns, batch, calls, dtype) for calls in (programs, matrices)]
            for _ in range(_ROUNDS)
        ],
        axis=0,
    )
    ours, dense = rounds[0].tolist()
    return (ours, dense), bool(np.all(rounds[1] <= _AGREEMENT * rounds[0]))


def measure() -> Rates:
    """Measure the rates, which takes about a second."""
    rng = np.random.RandomState(0)
    builders = {"row": _selection, "csr": _csr, "pair": _pairs, "block": _blocks}
    programs = {kind: [build(rng) for _ in range(_LAYERS)] for kind, build in builders.items()}
    programs["call"] = [_tiny() for _ in range(_TINY)]
    alone = _program_rates(programs, 1)
    shared = _program_rates(programs, max_threads()) if max_threads() > 1 else alone
    # At last, since threads of BLAS stay busy for a while after their work is done.
    return {
        **alone,
        **{SHARED[kind]: rate for kind, rate in shared.items()},
        "dense": _dense_rates(_SIDE, _LAYERS),
        "small dense": _dense_rates(_SMALL, _LAYERS * _SIDE**2 // _SMALL**2),
    }


def _program_rates(programs: dict[str, list[Program]], threads: int) -> Rates:
    times = {}
    for kind, layers in programs.items():
        rows = layers[0].columns
        times[kind] = [
            _seconds(rows, batch, [p.prepared((rows, batch), threads) for p in layers])
            for batch in BATCHES
        ]
    result = {"call": times["call"]}
    for kind in ("row", "csr", "pair", "block"):
        known = programs[kind][0].counts
        rest = {k: n for k, n in known.items() if n and k != kind}
        result[kind] = [
            max(0.0, t - sum(n * result[k][i] for k, n in rest.items())) / known[kind]
            for i, t in enumerate(times[kind])
        ]
    return result


def _dense_rates(side: int, layers: int) -> list[float]:
    calls = [w.__matmul__ for w in np.ones((layers, side, side), np.float32)]
    return [_seconds(side, batch, calls) / side**2 for batch in BATCHES]


def _seconds(
    rows: int, batch: int, calls: Sequence[Callable[[np.ndarray], object]], dtype: Any = np.float32
) -> float:
    """Return the time of one of `calls`, made in turn: the fastest rotation's mean."""
    X = np.ones((rows, batch), dtype)
    times: list[float] = []
    while sum(times[1:]) * len(calls) <= _PATIENCE:
        start = time.perf_counter()
        for call in calls:
            call(X)
        times.append((time.perf_counter() - start) / len(calls))
    return min(times[1:])  # the first compiles, and wakes threads


def _tiny() -> Program:
    program = Program(np.float32, half="", columns=1)
    program.add_selection(np.zeros(1, np.int64))
    return program.finish()


def _selection(rng: np.random.RandomState) -> Program:
    program = Program(np.float32, half="", columns=_SIDE)
    for _ in range(4):
        program.add_selection(rng.permutation(_SIDE))
    return program.finish()


def _csr(rng: np.random.RandomState) -> Program:
    program = Program(np.float32, half="", columns=_SIDE)
    per_row = _SIDE // 10
    indices = np.sort(rng.randint(_SIDE, size=(_SIDE, per_row)), axis=1)
    indptr = np.arange(_SIDE + 1) * per_row
    program.add_csr(np.ones(indices.size, np.float32), indices.ravel(), indptr)
    return program.finish()


def _pairs(rng: np.random.RandomState) -> Program:
    program = Program(np.float32, half="", columns=_SIDE)
    for d in (1, 8, _SIDE // 16, _SIDE // 2):
        program.add_kronecker(np.ones((_SIDE // 2 // d, d, 2, 2), np.float32))
    return program.finish()


def _blocks(rng: np.random.RandomState) -> Program:
    program = Program(np.float32, half="", columns=_SIDE)
    for d in (1, _SIDE // 32):
        program.add_kronecker(np.ones((_SIDE // 32 // d, d, 32, 32), np.float32))
    return program.finish()


def _is_pair(stored: object) -> bool:
    return isinstance(stored, (list, tuple)) and [*map(type, stored)] == [float, float]


def _is_complete(stored: object) -> bool:
    return isinstance(stored, dict) and all(
        isinstance(stored.get(kind), list) and len(stored[kind]) == len(BATCHES) for kind in KINDS
    )
