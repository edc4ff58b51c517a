"""Compress again and again in processes that are killed; run by the tests, which read its report.

Usage: killed_runs.py SOURCE FOLDER KILLS. Children are forked, so that libraries load once. Half of
them get SIGTERM, which the command line takes as a wish to stop, and must leave no partial file.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from matfact import MagnitudePruner
from matfact.checkpoint import compress
from matfact.cli._common import told_to_users


def run(source, out, *, die_at=None, number=signal.SIGKILL):
    """Compress; send this process a signal at the given write, rename or sync to disk."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == die_at:
                os.kill(os.getpid(), number)
            calls += 1
            return function(*args, **kwargs)

        return call

    originals = os.fsync, os.replace
    os.fsync, os.replace = map(counted, originals)
    try:
        compress(source, out, MagnitudePruner(density=0.4))
    finally:
        os.fsync, os.replace = originals
    return calls


def content(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def shards(out):
    """Return the shards that are recorded as finished, with what tells if they are rewritten."""
    if not (out / "journal.log").exists():
        return {}
    lines = (out / "journal.log").read_bytes().split(b"\n")[1:-1]
    names = [json.loads(line.partition(b" ")[2])["file"] for line in lines]
    return {name: (out / name).stat().st_ino for name in names}


def child(source, out, die_at=None, number=signal.SIGKILL):
    pid = os.fork()
    if pid == 0:
        try:
            with told_to_users():
                run(source, out, die_at=die_at, number=number)
        finally:
            os._exit(0)
    return pid


def partial(out):
    """Return whether there are partial files."""
    return out.exists() and any(path.name.startswith(".") for path in out.iterdir())


def resumed(source, out, expected):
    """Complete the work, and say whether anything was lost or done twice."""
    before = shards(out)
    run(source, out)
    now = {name: (out / name).stat().st_ino for name in before}
    return {"finished": len(before), "identical": content(out) == expected, "kept": now == before}


def main(source, folder, kills):
    reference = folder / "reference"
    started = time.perf_counter()
    calls = run(source, reference)
    seconds = time.perf_counter() - started
    expected = content(reference)
    report = []
    draw = random.Random(0)
    for trial in range(calls + kills):
        out = folder / "killed"
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        if trial < calls:  # at every moment between two changes on disk
            os.waitpid(child(source, out, trial, number), 0)
        else:  # at any moment, several times in a row
            for _ in range(draw.randint(1, 3)):
                pid = child(source, out)
                time.sleep(draw.uniform(0, 1.2 * seconds))
                os.kill(pid, number)
                os.waitpid(pid, 0)
        left = number == signal.SIGTERM and trial < calls and partial(out)
        report.append(resumed(source, out, expected) | {"left": left})
        shutil.rmtree(out)
    print(json.dumps({"calls": calls, "seconds": seconds, "trials": report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
