"""Fuzzing of all file readers, which must not crash, hang, or use much memory.

Valid files are damaged in their bytes, or in their contents with lengths and checksums corrected.
Readers run in forked processes, so that a crash is recorded as a finding.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzz._damage import Files, put
from benchmarks.fuzz._readers import Reader, readers
from benchmarks.memory import reset_peak, resident

SECONDS = 1.0  #: maximum CPU time per file
#: Signals that end a reader: CPU time limit, and timeout.
TIMERS = (
    (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, 30.0),
)
#: Maximum memory: a multiple of the file size, plus the first use of libraries.
FACTOR, SLACK = 4, 16 << 20
BATCH = 250  #: files per process


@dataclasses.dataclass(frozen=True)
class Finding:
    """An input that was not handled correctly."""

    reader: str
    number: int
    problem: str


class HangError(BaseException):
    """The reader took too long. Readers must not treat this as a damaged file."""


def _too_long(number: int, frame: Any) -> None:
    seconds = {kind: seconds for kind, _, seconds in TIMERS}[number]
    raise HangError(f"more than {seconds} s of {signal.Signals(number).name}")


def attempt(reader: Reader, files: Files, folder: Path) -> tuple[str, str]:
    """Read `files`; return "read", "refused" or "bad", and what was wrong."""
    for name, content in files.items():
        put(folder / name, content)
    size = sum(len(content) for content in files.values() if isinstance(content, bytes))
    before = reset_peak()
    for kind, timer, seconds in TIMERS:
        signal.signal(kind, _too_long)
        signal.setitimer(timer, seconds)
    try:
        reader.read(folder)
        outcome = ("read", "")
    except (ValueError, OSError) as error:
        outcome = ("refused", str(error))
    except BaseException as error:  # any other exception is a finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome = ("bad", f"{error!r:.200} at {Path(last.filename).name}:{last.lineno}")
    finally:
        for _, timer, _ in TIMERS:
            signal.setitimer(timer, 0)
    taken = 0 if before is None else (resident("VmHWM") or 0) - before  # Linux only
    if taken > FACTOR * size + SLACK and not reader.works:
        return "bad", f"{taken:,} bytes of memory for {size:,} on disk ({outcome[1]:.100})"
    return outcome


def make(reader: Reader, name: str, seed: int, number: int) -> Files:
    """Return input number `number`, deterministically."""
    rng = random.Random(f"{name} {seed} {number}")
    return reader.damage(rng, rng.choice(reader.seeds))


def run_batch(
    name: str, reader: Reader, seed: int, numbers: range
) -> tuple[collections.Counter[str], list[Finding]]:
    """Read inputs in a forked process; an input that kills it is a finding, the rest is read."""
    counts: collections.Counter[str] = collections.Counter()
    findings: list[Finding] = []
    while numbers:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            _child(name, reader, seed, numbers, into)
        os.close(into)
        with os.fdopen(out, "rb") as stream:
            outcomes = [json.loads(line) for line in stream]
        status = os.waitpid(pid, 0)[1]
        for number, (outcome, problem) in zip(numbers, outcomes, strict=False):
            counts[outcome] += 1
            if outcome == "bad":
                findings.append(Finding(name, number, problem))
        numbers = numbers[len(outcomes) :]
        if numbers:
            counts["bad"] += 1
            findings.append(Finding(name, numbers[0], f"process ended with status {status}"))
            numbers = numbers[1:]
    return counts, findings


def _child(name: str, reader: Reader, seed: int, numbers: range, into: int) -> None:
    """Write one line per input, and exit."""
    try:
        warnings.simplefilter("ignore")
        _limit_memory()
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            attempt(reader, reader.seeds[0], Path(folder))  # what is taken once in a process
        with os.fdopen(into, "w", buffering=1) as stream:
            for number in numbers:
                with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
                    outcome = attempt(reader, make(reader, name, seed, number), Path(folder))
                stream.write(json.dumps(outcome) + "\n")
    finally:
        os._exit(0)


def _limit_memory() -> None:
    """Limit further allocations to a gigabyte, even if unused."""
    import resource  # Windows lacks it, and fork

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    if pages:
        limit = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(
    count: int, seed: int, names: Sequence[str] | None = None
) -> Iterator[tuple[str, collections.Counter[str], list[Finding]]]:
    """Give about `count` inputs to all readers; yield the outcomes and findings of each."""
    found = {n: r for n, r in readers().items() if names is None or n in names}
    shares = {name: 0.1 if reader.works else 1.0 for name, reader in found.items()}
    for name, reader in found.items():
        warm(reader)
        each = math.ceil(count * shares[name] / sum(shares.values()))
        totals: collections.Counter[str] = collections.Counter()
        findings: list[Finding] = []
        for start in range(0, each, BATCH):
            counts, bad = run_batch(name, reader, seed, range(start, min(start + BATCH, each)))
            totals += counts
            findings += bad
        yield name, totals, findings


def warm(reader: Reader) -> None:
    """Read each valid file, which must succeed, so that all modules are imported before forks."""
    for files in reader.seeds:
        with tempfile.TemporaryDirectory() as folder:
            outcome, problem = attempt(reader, files, Path(folder))
            if problem and "arguments" not in files and "memory" not in problem:
                raise RuntimeError(f"a valid file was {outcome}: {problem}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=10_000, help="inputs, over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="only this reader (repeatable)")


def run(arguments: argparse.Namespace) -> int:
    print(f"{'reader':<12} {'read':>7} {'refused':>8} {'bad':>5} {'seconds':>8}")
    total = n_bad = 0
    for name, counts, findings in fuzz(arguments.count, arguments.seed, arguments.reader):
        numbers = f"{counts['read']:>7} {counts['refused']:>8} {counts['bad']:>5}"
        print(f"{name:<12} {numbers} {sum(os.times()[:4]):>8.0f}", flush=True)
        for finding in findings:
            print(f"{finding.reader} {finding.number}: {finding.problem}", file=sys.stderr)
        total, n_bad = total + counts.total(), n_bad + len(findings)
    print(f"{total} inputs, {n_bad} findings; seconds are CPU time since the start")
    return bool(n_bad)
