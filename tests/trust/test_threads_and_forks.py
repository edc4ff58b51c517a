"""Fits and products do not change thread settings, and work with threads and forks."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.base import clone
from threadpoolctl import threadpool_info, threadpool_limits

from matfact import MagnitudePruner, compare_projections
from matfact._threads import allowed_threads, single_threaded
from matfact.checkpoint import compress
from matfact.operators import FactorProduct, SparseFactor
from tests.conformance.estimators import FACTORIZERS

W = np.random.RandomState(0).standard_normal((32, 32))


def thread_settings():
    pools = sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info())
    return pools, allowed_threads()


@pytest.fixture
def one_blas_thread():
    with threadpool_limits(limits=1):
        yield


@pytest.mark.parametrize("name", FACTORIZERS)
def test_a_fit_leaves_the_numbers_of_threads_alone(name):
    clone(FACTORIZERS[name]).fit(W)  # may load libraries
    before = thread_settings()
    clone(FACTORIZERS[name]).fit(W)
    assert thread_settings() == before


def test_studies_and_compression_leave_the_numbers_of_threads_alone(tmp_path):
    save_file({"a.weight": W, "b.weight": np.full((8, 8), np.nan)}, tmp_path / "m.safetensors")
    compare_projections([W], ["magnitude"])
    before = thread_settings()
    compare_projections([W, W * np.nan], ["magnitude", "lowrank"])
    assert thread_settings() == before
    compress(tmp_path / "m.safetensors", tmp_path / "out", MagnitudePruner())
    assert thread_settings() == before


@pytest.mark.parametrize("name", FACTORIZERS)
def test_fits_in_four_threads_are_those_of_one(name, one_blas_thread):
    matrices = [np.random.RandomState(seed).standard_normal((32, 24)) for seed in range(4)]

    def fit(matrix):
        return clone(FACTORIZERS[name]).fit(matrix).operator_.toarray()

    expected = [fit(matrix) for matrix in matrices]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(fit, matrices * 2), expected * 2, strict=True):
            np.testing.assert_array_equal(found, one)


@pytest.fixture(scope="module")
def product():
    """A product large enough for the kernels to ask for help."""
    rng = np.random.RandomState(0)
    factors = [
        np.where(rng.random_sample((600, 600)) < 0.2, rng.standard_normal((600, 600)), 0)
        for _ in range(2)
    ]
    return FactorProduct([SparseFactor.from_dense(f.astype(np.float32)) for f in factors])


def test_products_in_four_threads_are_those_of_one(product):
    operands = [
        np.random.RandomState(seed).standard_normal((600, batch)).astype(np.float32)
        for seed, batch in enumerate((1, 3, 32, 200) * 3)
    ]
    dense = product.astype(np.float64).toarray()
    with ThreadPoolExecutor(4) as pool:
        for X, found in zip(operands, pool.map(product.__matmul__, operands), strict=True):
            np.testing.assert_allclose(found, dense @ X, rtol=1e-3, atol=1e-2)


def in_child(work):
    """Run `work` in a forked process; return its exit status, or None if it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(1200):  # minutes: other processes may hold the cores
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_fits_and_products_work_in_a_forked_child(product):
    X = np.ones((600, 64), np.float32)
    expected = product @ X  # helpers are waiting now, and the child has none of them
    model = clone(FACTORIZERS["dsf"]).fit(W)

    def work():
        np.testing.assert_allclose(product @ X, expected, rtol=1e-4)
        np.testing.assert_allclose(product @ X[:, 0], expected[:, 0], rtol=1e-4, atol=1e-3)
        again = clone(FACTORIZERS["dsf"]).fit(W)
        np.testing.assert_array_equal(again.operator_.toarray(), model.operator_.toarray())
        assert again.transform(W).shape == W.shape

    assert in_child(work) == 0
    work()  # and the parent is as it was


def test_the_limit_of_one_thread_is_that_of_its_python_thread():
    outside = allowed_threads()
    with ThreadPoolExecutor(1) as pool, single_threaded():
        with single_threaded():
            assert allowed_threads() == 1
        assert allowed_threads() == 1
        assert pool.submit(allowed_threads).result() == outside
    assert allowed_threads() == outside
