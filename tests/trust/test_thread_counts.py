"""Temporary thread settings are restored in any order of exits, and results do not change."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  its BLAS is loaded before anything is limited
from safetensors.numpy import save_file
from sklearn.base import clone
from threadpoolctl import threadpool_info, threadpool_limits

from matfact import BlockSVD, DoubleSparseFactorizer, MagnitudePruner
from matfact._threads import allowed_threads, fit_threads, limited_kernels, single_threaded
from matfact.checkpoint import compress
from tests.conformance.estimators import FACTORIZERS


def blas_threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def three_blas_threads():
    """More than one, also where there is one processor only."""
    with threadpool_limits(limits=3, user_api="blas"):
        assert set(blas_threads()) == {3}
        yield
        assert set(blas_threads()) == {3}


class User(threading.Thread):
    """A thread that enters a context, and leaves it when it is told to."""

    def __init__(self, context, error=None):
        super().__init__()
        self.context, self.error = context, error
        self.entered, self.may_leave = threading.Event(), threading.Event()
        self.start()
        assert self.entered.wait(60)

    def run(self):
        with suppress(KeyError), self.context():
            self.entered.set()
            self.may_leave.wait(60)
            if self.error is not None:
                raise self.error

    def leave(self):
        self.may_leave.set()
        self.join()


@pytest.mark.parametrize("context", [single_threaded, lambda: fit_threads(1)])
@pytest.mark.parametrize("error", [None, KeyError("planned")])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_last_to_leave_puts_the_threads_back(context, error, order):
    users = [User(context, error) for _ in range(3)]
    for i in order:
        assert set(blas_threads()) == {1}
        users[i].leave()
    assert set(blas_threads()) == {3}


def test_a_change_between_two_fits_is_noticed():
    with fit_threads(1):
        pass
    with threadpool_limits(limits=2, user_api="blas"):
        with fit_threads(1), fit_threads(1):
            assert set(blas_threads()) == {1}
        assert set(blas_threads()) == {2}


def test_openmp_and_kernels_are_limited_in_their_own_thread_alone():
    def settings():
        pools = {p["filepath"]: p["num_threads"] for p in threadpool_info()}
        return {name: n for name, n in pools.items() if "blas" not in name}, allowed_threads()

    before = settings()
    first, second = User(single_threaded), User(single_threaded)
    assert settings() == before
    first.leave()
    second.leave()
    assert settings() == before


def test_compressing_in_eight_threads_leaves_the_numbers_of_threads_alone(tmp_path):
    W = np.random.RandomState(0).standard_normal((64, 64)).astype(np.float32)
    save_file({f"{i}.weight": W for i in range(6)}, tmp_path / "m.safetensors")

    def run(i):
        compress(tmp_path / "m.safetensors", tmp_path / f"out{i}", MagnitudePruner())
        return BlockSVD(permute=True).fit(W[:16, :16]).nnz_

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(run, range(16)))) == 1
    assert set(blas_threads()) == {3}


@pytest.mark.parametrize("name", FACTORIZERS)
def test_fits_are_the_same_to_the_bit_for_any_number_of_threads(name):
    W = np.random.RandomState(0).standard_normal((96, 80))
    X = np.random.RandomState(1).standard_normal((200, 80))
    options = {"calibration": X} if name in ("admm", "wanda", "lowrank", "blocksvd") else {}

    def fit(count):
        with threadpool_limits(limits=count, user_api="blas"):
            return clone(FACTORIZERS[name]).fit(W, **options)

    one, three = fit(1), fit(3)
    np.testing.assert_array_equal(three.operator_.toarray(), one.operator_.toarray())
    assert three.reconstruction_err_ == one.reconstruction_err_


def test_kernels_of_a_fit_are_the_same_to_the_bit_for_any_number_of_threads(monkeypatch):
    W = np.random.RandomState(0).standard_normal((600, 1000)).astype(np.float32)
    model = DoubleSparseFactorizer(max_iter=1)
    monkeypatch.setattr("matfact._threads.max_threads", lambda: 3)
    assert allowed_threads() == 3
    many = model.fit(W).operator_.toarray()
    with limited_kernels(1):
        np.testing.assert_array_equal(model.fit(W).operator_.toarray(), many)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_a_child_forked_during_a_fit_has_no_limit_for_good():
    with fit_threads(1):
        pid = os.fork()
        if pid == 0:
            with fit_threads(1):
                pass
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
