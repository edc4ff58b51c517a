"""Samples go through sparse factors as they are stored, on torch's threads."""

import copy
import gc
import os
import pickle
import signal
import threading
import weakref

import numba
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.kernels import gathers  # noqa: E402
from matfact.kernels.vectors import store_values, zeros  # noqa: E402
from matfact.operators import FactorProduct, SparseFactor  # noqa: E402
from matfact.torch import FactorizedLinear, MonarchLinear, SparseProductLinear  # noqa: E402
from matfact.torch.layers import _pool  # noqa: E402

DTYPES = {
    torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2,
}  # fmt: skip


def sparse(rows, columns, density, seed=0):
    """Return a random factor with an empty row."""
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random((rows, columns)) < density)
    places = places[places // columns != rows // 2]
    return SparseFactor.from_locations(rng.standard_normal(len(places)), places, (rows, columns))


def layer_of(*factors, bias=True):
    product = FactorProduct(factors)
    return FactorizedLinear(product, torch.ones(product.shape[0]) if bias else None).eval()


def keeps_nothing(layer):
    return layer._host._kept is None and layer._product._kept is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [130, 300])
@pytest.mark.parametrize("density", [0.02, 0.2])
@torch.no_grad()
def test_it_is_multiplied_by_the_product(dtype, columns, density):
    layer = layer_of(sparse(200, 150, density), sparse(150, columns, density, 1)).to(dtype)
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, exact = layer(x), copy.deepcopy(layer).double()
    expected = nn.functional.linear(x.double(), exact.weight, exact.bias)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert torch.linalg.norm(found - expected) <= DTYPES[dtype] * torch.linalg.norm(expected)
    assert keeps_nothing(layer)


@pytest.mark.parametrize("through", [lambda p: p.data, lambda p: p.detach().numpy()])
@torch.no_grad()
def test_untracked_writes_count_although_nothing_is_kept(through):
    layer, x = layer_of(sparse(200, 150, 0.1), bias=False), torch.ones(150, dtype=torch.float64)
    before = layer(x)
    through(layer.factors[0].values)[-1] += 1.0
    after = layer(x)
    assert keeps_nothing(layer)
    assert (after - before).abs().max() == pytest.approx(1.0)
    assert int((after != before).sum()) == 1


@torch.no_grad()
def test_copies_and_pickles_read_their_own_values():
    layer, x = layer_of(sparse(200, 150, 0.1), bias=False), torch.ones(150, dtype=torch.float64)
    before = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.factors[0].values.mul_(2)
        torch.testing.assert_close(other(x), 2 * before)
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_infinity_reaches_only_rows_that_store_its_column():
    layer, x = layer_of(sparse(200, 150, 0.1), bias=False), torch.ones(150, dtype=torch.float64)
    for column in range(0, 150, 7):
        x.fill_(1.0)[column] = torch.inf
        stored = layer.weight[:, column] != 0
        assert torch.equal(layer(x).isfinite(), ~stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_samples", [2, 7, 16, 33, 100, 300])
@torch.no_grad()
def test_several_samples_are_multiplied_by_the_product(n_samples, dtype):
    layer = layer_of(sparse(200, 150, 0.05), sparse(150, 300, 0.05, 1)).to(dtype)
    x = torch.randn(300, n_samples, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = nn.functional.linear(x.T.double(), layer.weight.double(), layer.bias.double())
    for samples in (x.T, x.T.contiguous(), x.T.reshape(1, n_samples, 300)):
        found = layer(samples).reshape(n_samples, 200)
        assert torch.linalg.norm(found - expected) <= DTYPES[dtype] * torch.linalg.norm(expected)
    assert keeps_nothing(layer)


@pytest.mark.parametrize("n_samples", [1, 20])
@torch.no_grad()
def test_samples_that_are_negated_lazily(n_samples):
    layer = layer_of(sparse(200, 150, 0.05), bias=False)
    x = torch.randn(n_samples, 150, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


@pytest.mark.parametrize("n_samples", [1, 3, 64, 500])
@torch.no_grad()
def test_bits_do_not_depend_on_threads(n_samples):
    layer = SparseProductLinear(1024, 1024, density=0.1, random_state=0).eval()
    generator, found = torch.Generator().manual_seed(0), []
    x, before = torch.randn(n_samples, 1024, generator=generator), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(layer(x))
    torch.set_num_threads(before)
    assert keeps_nothing(layer)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads of torch, and no other pool."""

    def fail(*_, **__):
        raise AssertionError("a second pool of threads was woken")

    monkeypatch.setattr("matfact.kernels.threads.lend", fail)
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    assert threading.active_count() == running


LAYERS = {
    "sparse": lambda: SparseProductLinear(1024, 1024, density=0.25, random_state=0),
    "Monarch": lambda: MonarchLinear(1024, 1024, random_state=0),
    "codes": lambda: FactorizedLinear(
        SparseProductLinear(1024, 1024, density=0.25, random_state=0).to_product().quantized(8)
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n_samples", [1, 64, 1000])
def test_layers_use_no_threads_but_torchs(kind, n_samples, two_threads):
    layer = LAYERS[kind]().eval()
    x = torch.randn(n_samples, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer.to_dense()(x), rtol=1e-4, atol=1e-4)


def test_training_uses_no_threads_but_torchs(two_threads):
    layer = LAYERS["sparse"]()
    x = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0))
    layer(x).sum().backward()
    expected = layer.factors[0].values.grad.clone()
    torch.set_num_threads(1)
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.factors[0].values.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_single_samples_work_in_forked_processes(kind, two_threads):
    layer, x = LAYERS[kind]().eval(), torch.randn(1, 1024)
    layer(torch.randn(64, 1024))  # torch's threads run
    expected = layer(x).numpy()
    child = os.fork()
    if not child:
        signal.alarm(30)  # ends a process that hangs, as torch's parallel operations do there
        os._exit(not np.array_equal(layer(x).numpy(), expected))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("is_old", [False, True])
def test_errors_on_torchs_threads_are_raised(is_old, monkeypatch):
    if is_old:
        monkeypatch.setattr(_pool, "_parallel_for", lambda: None)
    done = []
    _pool.run([lambda: done.append(0), lambda: done.append(1)])
    assert sorted(done) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        _pool.run([lambda: 1 / 0, lambda: None])


@torch.no_grad()
def test_values_that_do_not_match_their_positions_are_not_read():
    layer, x = layer_of(sparse(200, 150, 0.1)), torch.ones(150, dtype=torch.float64)
    layer(x)
    layer.factors[0].values.data = layer.factors[0].values.data[:10]
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        layer(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gather_instructions_and_scalar_loads_find_the_same(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    source = rng.standard_normal(1 << 16).astype(dtype)
    indices = rng.integers(1 << 16, size=64 // source.itemsize + 3).astype(np.uint16)
    gather = gathers.gather
    for fast in (gathers._FAST, ()):
        monkeypatch.setattr(gathers, "_FAST", fast)

        @numba.njit
        def gathered(source, indices, out):
            store_values(out, 0, gather(source, indices, 3, zeros(source, 64)))

        out = np.empty(64 // source.itemsize, dtype)
        gathered(source, indices, out)
        np.testing.assert_array_equal(out, source[indices[3:]])


@torch.no_grad()
def test_values_that_a_layer_lets_go_are_freed():
    layer = layer_of(sparse(200, 150, 0.1))
    layer(torch.ones(150, dtype=torch.float64))
    held = weakref.ref(layer.factors[0].values)
    layer.factors[0].values = nn.Parameter(torch.zeros_like(layer.factors[0].values))
    gc.collect()
    assert held() is None
    assert torch.equal(layer(torch.ones(150, dtype=torch.float64)), layer.bias)


@torch.no_grad()
def test_positions_outside_of_a_factor_are_not_read():
    layer, x = layer_of(sparse(200, 150, 0.1), bias=False), torch.ones(150, dtype=torch.float64)
    modules = layer.factors._modules.values()
    assert layer._in_place.apply(modules, x) is not None
    layer.factors[0].indices.fill_(255)
    assert layer._in_place.apply(modules, x) is None
