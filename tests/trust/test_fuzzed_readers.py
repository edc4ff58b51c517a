"""A slice of the files that ``python -m benchmarks fuzz`` gives to all readers."""

import os
import random
import signal
import time

import pytest

# The benchmarks are not installed with the library.
from benchmarks import fuzz

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes to be forked")


@pytest.fixture(scope="module")
def readers():
    return fuzz.readers()


@needs_fork
def test_no_reader_crashes_hangs_or_takes_much_memory():
    for name, counts, findings in fuzz.fuzz(1000, seed=1):
        assert findings == []
        assert counts["refused"] > 0.1 * counts.total(), name
        # The damage is not so heavy that all of it is found at once.
        assert counts["read"] > 0 or counts.total() < 100, name


def test_damage_is_the_same_each_time(readers):
    for name, reader in readers.items():
        assert fuzz.make(reader, name, 0, 7) == fuzz.make(reader, name, 0, 7)
        assert fuzz.make(reader, name, 0, 7) != fuzz.make(reader, name, 0, 8)


def hold_much(folder):
    return (b"x" * (64 << 20)).count(b"y")


def take_long(folder):
    while True:
        time.process_time()


def crash(folder):
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (hold_much, "bytes of memory"),
        (take_long, "more than"),
        (crash, "ended with status"),
        (lambda folder: {}["name"], "KeyError"),
    ],
)
def test_what_is_looked_for_is_found(read, problem):
    def damage(rng: random.Random, files):
        return files

    reader = fuzz.Reader([{"file": b"content"}], damage, read)
    counts, findings = fuzz.run_batch("made up", reader, 0, range(1))
    assert counts["bad"] == len(findings) == 1
    assert all(problem in finding.problem for finding in findings)
