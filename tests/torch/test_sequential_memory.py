"""Memory of waiting batches, in processes whose C library returns freed memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads what Linux says of processes"
)

COMMON = """
import json, os, sys
import torch
from torch import nn
from matfact.torch.calibration.sequential import sequential_statistics

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
"""

WAITING = """
block = nn.Sequential(nn.Linear(576, 1536), nn.Linear(1536, 64))
model, batches = nn.Sequential(block, nn.Linear(64, 64)), [torch.randn(512, 576)] * 24
stops = sequential_statistics(model, ["0.0", "1"], batches)
next(stops)
before, threads = resident(), len(os.listdir("/proc/self/task"))
next(stops)
print(json.dumps([resident() - before, len(os.listdir("/proc/self/task")) - threads]))
"""

OFFLOADED = """
model = nn.Sequential(nn.Linear(16, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 16))
batches = [torch.randn(4096, 16) for _ in range(8)]

def taken(folder):
    stops = sequential_statistics(model, ["0", "1", "2"], batches, folder=folder)
    next(stops)
    before, found = resident(), []
    for stop in stops:
        del stop  # with its Gram matrices
        found.append(resident() - before)
    return min(found)

print(json.dumps([taken(None), taken(sys.argv[1])]))
"""


def measured(code, *arguments):
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    run = subprocess.run(
        [sys.executable, "-c", COMMON + code, *map(str, arguments)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return json.loads(run.stdout)


def test_batches_that_wait_hold_no_workers_and_no_work_space():
    grown, threads = measured(WAITING)
    states = 4 * 512 * 64 * 24
    assert grown < states + 3e6  # each batch has made 3 MB of the first layer
    assert threads <= 2


def test_offloaded_states_are_not_in_memory(tmp_path):
    states = 8 * 4096 * 1024 * 4
    in_memory, in_files = measured(OFFLOADED, tmp_path)
    assert in_memory > 0.9 * states
    assert in_files < 0.4 * states  # two Gram matrices of 8 MB, and what one batch is worth
    assert not list(tmp_path.iterdir())
