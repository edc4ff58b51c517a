"""Compression on a Dask cluster of local processes: time, output, and memory per worker."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from safetensors.numpy import save_file
from sklearn.base import clone

from benchmarks.memory import reset_peak, resident
from benchmarks.tables import markdown_table
from matfact import checkpoint
from matfact.compare import METHODS
from matfact.compare._environment import environment
from matfact.factorizers import BaseFactorizer

DENSITY = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--measure", nargs="*", default=["speed", "memory"], choices=["speed", "memory"])
    add("--output", type=Path, default=Path("build/benchmarks"), help="output folder")
    add("--layers", type=int, default=8, help="number of layers for the measurement of speed")
    add("--rounds", type=int, default=4, help="measurements of speed; the best counts")
    add("--side", type=int, default=288, help="side of these layers")
    add("--workers", type=int, nargs="*", default=[1, 4], help="numbers of one-thread workers")
    add("--sides", type=int, nargs="*", default=[512, 1024, 2048], help="sides, for memory")
    add("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="for memory")
    add("--quick", action="store_true", help="tiny layers")


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.layers, options.side, options.workers, options.rounds = 4, 32, [1, 2], 1
        options.sides, options.methods = [64], ["dsf"]
    result: dict[str, Any] = {"machine": environment(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.measure:
            rows = {"speed": speed, "memory": memory}[name](Path(folder), options)
            print(table(rows), flush=True)
            result[name] = rows
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, default=str)
    (options.output / "cluster.json").write_text(text)
    return int(any(row["bytes"] != "identical" for row in result.get("speed", ())))


def estimator(method: str, **parameters: Any) -> BaseFactorizer:
    found = clone(METHODS[method].estimator).set_params(density=DENSITY)
    return found.set_params(**{k: v for k, v in parameters.items() if k in found.get_params()})


def write(path: Path, sides: Sequence[int]) -> None:
    """Write a network with a square layer of each side."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((n, n), np.float32) for n in sides]
    save_file({f"{i}.weight": W for i, W in enumerate(weights)}, path)


@contextmanager
def cluster(workers: int, methods: Sequence[str]) -> Iterator[Any]:
    """Start workers, with all modules loaded and compiled."""
    from distributed import Client, LocalCluster

    local = LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=":0", host="127.0.0.1"
    )
    with local, Client(local) as client:
        client.run(warm, methods)
        yield client


def warm(methods: Sequence[str]) -> None:
    W = np.random.default_rng(0).standard_normal((48, 48), np.float32)
    for method in methods:
        estimator(method).fit(W)


def speed(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compress a network in this process and on clusters, in turn; keep the best times."""
    source = folder / "speed.safetensors"
    write(source, [options.side] * options.layers)
    warm(["dsf"])
    rows: dict[int, list[dict[str, Any]]] = {count: [] for count in (0, *options.workers)}
    with ExitStack() as clusters:
        clients = {n: clusters.enter_context(cluster(n, ["dsf"])) for n in options.workers}
        for i in range(options.rounds):
            for count, row in rows.items():
                row.append(timed(source, folder / f"{i}-by-{count}", clients.get(count)))
    best = [{"workers": n} | min(row, key=lambda r: r["seconds"]) for n, row in rows.items()]
    expected = contents(folder / "0-by-0")
    for row, count in zip(best, rows, strict=True):
        outs = (folder / f"{i}-by-{count}" for i in range(options.rounds))
        row["bytes"] = "identical" if all(contents(out) == expected for out in outs) else "NOT"
        row["rounds"] = " ".join(f"{one['seconds']:.1f}" for one in rows[count])
    return best


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def timed(source: Path, out: Path, client: Any) -> dict[str, Any]:
    """Compress once; return wall and CPU times."""
    before, start = spent(client), time.perf_counter()
    compress(client, source, out, estimator("dsf"))
    seconds = time.perf_counter() - start
    ours, everyones = (now - then for now, then in zip(spent(client), before, strict=True))
    return {
        "seconds": seconds,
        "processor_seconds": ours,
        "cores_of_others": max(0.0, everyones - ours) / seconds,
    }


def compress(client: Any, *work: Any) -> None:
    """Compress with all workers, or in this process without a cluster."""
    if client is None:
        checkpoint.compress(*work)
    elif sum(client.ncores().values()) == 1:  # joblib would run in this process
        client.submit(checkpoint.compress, *work, pure=False).result()
    else:
        with joblib.parallel_config("dask", client=client):
            checkpoint.compress(*work)


def spent(client: Any) -> tuple[float, float]:
    """Return the CPU time of this process and the workers, and of the whole machine."""
    ours = time.process_time() + sum(client.run(time.process_time).values() if client else ())
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # without idle and I/O wait
    return ours, busy / os.sysconf("SC_CLK_TCK")


def memory(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the memory of a worker for one layer, and for many up to the same size."""
    rows = []
    for method in options.methods:
        for side in options.sides:
            many = [side, *[side // 2] * 4, *[side // 4] * 4, side, side]
            for sides in ([side], many):
                rows.append({"method": method, "side": side, "layers": len(sides)})
                rows[-1] |= taken(folder, method, sides)
    return rows


def taken(folder: Path, method: str, sides: Sequence[int]) -> dict[str, Any]:
    """Return the peak memory of a worker above idle, divided by the bytes of the largest layer."""
    source, out = folder / f"{max(sides)}x{len(sides)}.safetensors", folder / f"{method}-{sides}"
    write(source, sides)
    with cluster(1, [method]) as client:
        (before,) = client.run(reset_peak).values()
        compress(client, source, out, estimator(method, max_iter=20))
        (peak,) = client.run(resident, "VmHWM").values()
    return {
        "rest": before,
        "peak": peak,
        "times_the_layer": (peak - before) / (4 * max(sides) ** 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)
    return markdown_table(list(rows[0]), lines)
