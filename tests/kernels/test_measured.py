"""What was measured is kept for later processes, where that is possible."""

import json

import pytest

from matfact.kernels import measured
from matfact.kernels.measured import recall


def in_another_process(name="speed", value=1.5, undisturbed=True, seen=None):
    """Recall a number as a new process would, and note in `seen` that it was measured."""
    measured._known.cache_clear()

    def measure():
        if seen is not None:
            seen.append(name)
        return value, undisturbed

    return recall(name, measure, lambda stored: isinstance(stored, float))


def test_what_one_process_measured_the_next_one_reads(times):
    seen = []
    assert [in_another_process(value=value, seen=seen) for value in (1.5, 2.5)] == [1.5, 1.5]
    assert in_another_process("other", 3.5, seen=seen) == 3.5
    assert in_another_process(value=4.5, seen=seen) == 1.5
    assert seen == ["speed", "other"]


def test_a_process_measures_once_without_reading_again(times):
    assert in_another_process() == 1.5
    times.unlink()
    assert recall("speed", lambda: (2.5, True), lambda stored: True) == 1.5


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", "\x00", '{"speed": 1.5}', '{"speed": {"until": 1e300}}',
     '{"speed": {"value": "fast", "until": 1e300}}', '{"speed": {"value": 1.5, "until": "later"}}'],
)  # fmt: skip
def test_what_is_damaged_is_measured_anew(times, content):
    times.parent.mkdir()
    times.write_text(content)
    assert in_another_process(value=2.5) == 2.5
    assert json.loads(times.read_text())["speed"]["value"] == 2.5
    assert in_another_process() == 2.5


def test_a_folder_that_cannot_be_written_is_no_failure(times):
    times.parent.write_text("")
    assert in_another_process() == 1.5


@pytest.mark.parametrize("busy", [False, True])
def test_what_other_work_may_have_disturbed_counts_for_an_hour(times, monkeypatch, busy):
    monkeypatch.setattr(measured, "_is_busy", lambda: busy)
    assert in_another_process(undisturbed=busy) == 1.5
    assert in_another_process(value=2.5) == 1.5
    later = measured.time.time() + 3601
    monkeypatch.setattr(measured.time, "time", lambda: later)
    assert in_another_process(value=2.5) == 2.5
