"""Helper threads share calls and sleep in between; callers never wait for missing helpers."""

import os
import threading
import time
import weakref

import pytest

from matfact.kernels import threads


@pytest.fixture(autouse=True)
def no_helpers(monkeypatch):
    """Begin with a pool of no threads."""
    monkeypatch.setattr(threads, "_free", [])
    monkeypatch.setattr(threads, "_helpers", [])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_call_is_made_once_before_run_returns(count):
    made = []
    for times in range(20):
        threads.run([lambda i=i: made.append(i) for i in range(count)])
        assert sorted(made) == sorted([*range(count)] * (times + 1))
    assert len(threads._helpers) <= count - 1


def test_calls_run_side_by_side():
    meeting = threading.Barrier(3)
    threads.run([lambda: meeting.wait(60)] * 3)


def test_an_error_is_raised_when_all_calls_are_done():
    made = []

    def fail():
        raise KeyError("of a call")

    with pytest.raises(KeyError, match="of a call"):
        threads.run([fail, lambda: made.append(1), lambda: (time.sleep(0.05), made.append(2))])
    assert sorted(made) == [1, 2]


def test_nobody_waits_for_helpers_that_do_other_things():
    end, made = threading.Event(), []
    threads.lend(lambda: end.wait(60), 1)
    threads.run([lambda: made.append(threading.current_thread())] * 2)
    assert made == [threading.current_thread()] * 2
    assert len(threads._helpers) == 1
    end.set()


def test_helpers_that_stay_free_are_not_waited_for_either():
    end, made = threading.Event(), []
    threads.lend(lambda: end.wait(60), 1, stays_free=True)
    while not threads._free:
        time.sleep(0.001)
    threads.run([lambda: made.append(threading.current_thread())] * 2)
    assert made == [threading.current_thread()] * 2
    end.set()


def test_calls_are_made_where_the_system_has_no_more_threads(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    made = []
    threads.run([lambda: made.append(1)] * 4)
    assert made == [1] * 4


def test_helpers_sleep_and_let_go_of_what_they_have_called():
    class Operand:
        pass

    operand, gone = Operand(), threading.Event()
    finalizer = weakref.finalize(operand, gone.set)
    meeting = threading.Barrier(3)
    threads.run([lambda operand=operand: meeting.wait(60)] * 3)
    while len(threads._free) < 2:
        time.sleep(0.001)
    del operand
    assert gone.wait(60)
    assert not finalizer.alive
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_helpers_of_its_own():
    meeting = threading.Barrier(2)
    threads.run([lambda: meeting.wait(60)] * 2)
    child = os.fork()
    if child == 0:
        try:
            again = threading.Barrier(2)
            threads.run([lambda: again.wait(60)] * 2)
            os._exit(len(threads._helpers))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
