"""What kernels must not read in place is applied by torch, or refused."""

import copy
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from matfact.operators import DenseFactor, FactorProduct, SparseFactor  # noqa: E402
from matfact.torch import FactorizedLinear, keep_unchecked  # noqa: E402


def dense_product(rows=200, columns=300):
    rng = np.random.default_rng(0)
    return FactorProduct([DenseFactor(rng.standard_normal((rows, columns), dtype=np.float32))])


def sparse_product(rows=200, columns=300):
    rng = np.random.default_rng(0)
    places = np.flatnonzero(rng.random(rows * columns) < 0.1)
    values = rng.standard_normal(len(places), dtype=np.float32)
    return FactorProduct([SparseFactor.from_locations(values, places, (rows, columns))])


PRODUCTS = {
    "sparse": sparse_product,
    "sparse codes": lambda: sparse_product().quantized(8),
    "dense codes": lambda: dense_product().quantized(8),
}


@pytest.fixture(params=PRODUCTS)
def layer(request):
    return FactorizedLinear(PRODUCTS[request.param](), torch.ones(200)).eval()


def samples(count=2):
    return torch.randn(count, 300, generator=torch.Generator().manual_seed(0))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_offloaded_values_are_not_read_where_there_is_nothing(layer):
    accelerate = pytest.importorskip("accelerate")
    expected = layer(samples())
    network = nn.Sequential(layer)
    accelerate.cpu_offload(network, execution_device="cpu")  # buffers stay on the CPU
    assert next(network.parameters()).is_meta
    assert_close(network(samples()), expected)


@torch.no_grad()
def test_modes_see_all_operations(layer):
    layer(samples())
    with FlopCounterMode(display=False) as counter:
        layer(samples())
    assert counter.get_total_flops() > 0
    graph, other = make_fx(layer)(samples()), torch.ones(2, 300)
    assert_close(graph(other), layer(other))


@torch.no_grad()
def test_the_default_device_does_not_matter(layer):
    x = samples()
    with torch.device("meta"):
        found = layer(x)
    assert found.is_cpu
    assert_close(found, layer(x))


@torch.no_grad()
def test_freed_inputs_are_refused(layer):
    x = samples()
    layer(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        layer(x)


@torch.no_grad()
def test_memory_is_not_freed_while_another_thread_reads_it():
    layer = FactorizedLinear(sparse_product(600, 300)).eval()
    state, expected = copy.deepcopy(layer.state_dict()), layer(samples())
    found, stop = [], threading.Event()

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                found.append(bool(torch.allclose(layer(samples()), expected, atol=1e-4)))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        layer.load_state_dict(state)  # makes new tensors for the positions
    stop.set()
    for thread in threads:
        thread.join()
    assert found
    assert all(found)


@pytest.mark.parametrize("n_samples", [1, 2, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@torch.no_grad()
def test_codes_of_another_dtype_are_never_taken_for_bytes(n_samples, dtype):
    layer = FactorizedLinear(PRODUCTS["dense codes"]()).eval()
    x = samples(n_samples)
    layer(x)
    factor = layer.factors[0]
    factor.codes = factor.codes.view(dtype) if dtype is torch.uint8 else factor.codes.to(dtype)
    expected = x @ layer.weight.T
    try:
        found = layer(x)
    except TypeError as error:
        found = str(error)
    if isinstance(found, str):
        assert "codes of dtype int8" in found
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("n_samples", [2, 150])
def test_the_bias_learns_while_codes_are_frozen(n_samples):
    layer = FactorizedLinear(PRODUCTS["dense codes"](), torch.ones(200)).eval()
    layer.factors.requires_grad_(False)
    layer(samples(n_samples)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((200,), float(n_samples)))


def test_outputs_can_be_changed_in_place():
    layer = FactorizedLinear(PRODUCTS["dense codes"]()).eval().requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    layer(samples(150)).mul_(scale).sum().backward()
    assert scale.grad is not None


@torch.no_grad()
def test_negated_inputs_are_resolved(layer):
    x = torch._neg_view(samples())
    assert_close(layer(x), layer(-samples()))
    keep_unchecked(layer)
    assert_close(layer(x), layer(-samples()))


def test_a_coding_that_cannot_be_is_not_loaded():
    layer = FactorizedLinear(PRODUCTS["dense codes"]()).eval()
    state = layer.state_dict()
    state["factors.0.coding"] = torch.tensor([8, 64, 0])
    with pytest.raises(RuntimeError, match="coding must hold bits from 2 to 8"):
        layer.load_state_dict(state)
