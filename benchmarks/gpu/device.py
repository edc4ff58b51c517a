"""The GPU, or the CPU that stands in for it in a rehearsal."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_REPEATS = 9
#: Bytes of weights to rotate over, more than caches hold.
_ROTATION = 256 << 20


class Device:
    """Where measures are taken, how large they are, and how they are timed."""

    def __init__(self, rehearses: bool) -> None:
        self.rehearses = rehearses
        self.name = "cpu" if rehearses else "cuda"
        has_triton = importlib.util.find_spec("triton") is not None
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        #: Whether Triton's kernels can run.
        self.has_kernels = has_triton and interprets == rehearses

    def describe(self) -> dict[str, Any]:
        """Return the hardware and its software."""
        found: dict[str, Any] = {"torch": torch.__version__, "rehearsal": self.rehearses}
        if self.has_kernels:
            import triton

            found["triton"] = triton.__version__
        if self.rehearses:
            return found
        properties = torch.cuda.get_device_properties(0)
        return found | {
            "gpu": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": torch.cuda.get_device_capability(0),
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }

    def pick(self, real: Any, rehearsed: Any) -> Any:
        """Return a size for this device."""
        return rehearsed if self.rehearses else real

    def copies(self, n_bytes: int) -> int:
        """Return how many copies of a weight leave caches."""
        return self.pick(max(2, min(32, _ROTATION // max(1, n_bytes))), 1)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return random numbers, the same on each device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.name, dtype)

    def seconds(self, calls: Sequence[Callable[[], Any]], replays: bool = True) -> float:
        """Return the time of one of `calls`, which differ in their weights.

        On a GPU they are replayed as a graph, so that the host does not count, unless they cannot.
        """
        for call in calls:
            call()
        if self.rehearses:
            return self._clocked(calls)
        run = self._graph(calls) if replays else lambda: [call() for call in calls]
        times = []
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / len(calls))
        return statistics.median(times)

    @staticmethod
    def _clocked(calls: Sequence[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    @staticmethod
    def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def wall(self, call: Callable[[], Any]) -> float:
        """Return the time of one call that cannot be repeated often, after a first one."""
        call()
        if not self.rehearses:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if not self.rehearses:
            torch.cuda.synchronize()
        return time.perf_counter() - start
