"""Samples go through quantized factors as they are stored."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.operators import DenseFactor, FactorProduct, SparseFactor  # noqa: E402
from matfact.torch import FactorizedLinear, keep_unchecked  # noqa: E402
from matfact.torch.layers._coded import _SLAB  # noqa: E402


def sparse(rows, columns, density, seed=0):
    """Return a random factor with an empty row and a full one."""
    rng = np.random.default_rng(seed)
    stored = rng.random((rows, columns)) < density
    stored[rows // 2], stored[rows // 3] = False, True
    places = np.flatnonzero(stored)
    values = rng.standard_normal(len(places), dtype=np.float32)
    return SparseFactor.from_locations(values, places, (rows, columns))


def layer_of(bits=8, group_size=64, density=0.1):
    product = FactorProduct([sparse(200, 150, density), sparse(150, 300, density, 1)])
    coded = product.quantized(bits, group_size)
    return FactorizedLinear(coded, torch.ones(200)).eval()


def dense_layer_of(rows, columns, bits=8, group_size=64):
    weight = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    product = FactorProduct([DenseFactor(weight)]).quantized(bits, group_size)
    return FactorizedLinear(product, torch.ones(rows)).eval()


def keeps_nothing(layer):
    return layer._host._kept is None and layer._product._kept is None


def samples(count, columns=300):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(0))


def assert_exact(layer, x):
    """Assert that the output is that of the dense matrix, up to rounding."""
    exact = copy.deepcopy(layer).double()
    expected = nn.functional.linear(x.double(), exact.weight, exact.bias)
    assert torch.linalg.norm(layer(x) - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("group_size", [3, 16, 64, None])
@pytest.mark.parametrize("n_samples", [1, 2, 7, 33, 300])
@torch.no_grad()
def test_they_are_multiplied_by_the_product(bits, group_size, n_samples):
    layer = layer_of(bits, group_size, 0.05)
    assert_exact(layer, samples(n_samples))
    assert keeps_nothing(layer)


@pytest.mark.parametrize("through", [lambda t: t.data, lambda t: t.detach().numpy()])
@pytest.mark.parametrize("n_samples", [1, 9])
@torch.no_grad()
def test_untracked_writes_count_although_nothing_is_kept(through, n_samples):
    layer, x = layer_of(), samples(n_samples)
    for tensor in (layer.factors[1].scales, layer.factors[0].codes):
        before = layer(x)
        through(tensor)[-1] += 1
        after = layer(x)
        assert keeps_nothing(layer)
        assert not torch.equal(after, before)
        assert_exact(layer, x)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("group_size", [3, 16, 64, None])
@pytest.mark.parametrize("columns", [5, 16, 150, 301])
@torch.no_grad()
def test_samples_are_multiplied_by_a_dense_factor_as_it_is_stored(bits, group_size, columns):
    layer = dense_layer_of(200, columns, bits, group_size)
    for n_samples in (1, 2, 4, 7, 129):
        assert_exact(layer, samples(n_samples, columns))
    assert keeps_nothing(layer)


@pytest.mark.parametrize("n_samples", [1, 6, 128])
@torch.no_grad()
def test_infinity_in_a_sample_reaches_no_other(n_samples):
    layer, x = dense_layer_of(200, 301), samples(n_samples, 301)
    x[0, 70] = torch.inf
    assert torch.equal(layer(x).isfinite().all(1), x.isfinite().all(1))


@torch.no_grad()
def test_unchecked_layers_read_dense_factors_in_place_too():
    layer = keep_unchecked(dense_layer_of(200, 300))
    for n_samples in (1, 5, 128):
        assert_exact(layer, samples(n_samples))
    assert keeps_nothing(layer)


@torch.no_grad()
def test_two_dense_factors_are_read_together():
    rng = np.random.default_rng(0)
    shapes = ((200, 16), (16, 300))
    factors = [DenseFactor(rng.standard_normal(s, dtype=np.float32)) for s in shapes]
    layer = FactorizedLinear(FactorProduct(factors).quantized(8)).eval()
    for n_samples in (1, 2, 9, 128):
        assert_exact(layer, samples(n_samples))
    assert keeps_nothing(layer)


@torch.no_grad()
def test_a_dense_factor_may_have_more_rows_than_32_bit_groups_allow():
    layer = dense_layer_of(50_000, 40, group_size=16)
    assert layer.factors[0].groups.dtype == torch.int64
    assert_exact(layer, samples(1, 40))
    assert keeps_nothing(layer)


@pytest.mark.parametrize("n_samples", [1, 3, 128])
@torch.no_grad()
def test_untracked_writes_to_a_dense_factor_count(n_samples):
    layer, x = dense_layer_of(200, 300), samples(n_samples)
    for tensor in (layer.factors[0].scales, layer.factors[0].codes):
        before = layer(x)
        tensor.data[-1] += 1
        assert not torch.equal(layer(x), before)
        assert_exact(layer, x)
    assert keeps_nothing(layer)


@torch.no_grad()
def test_a_large_dense_factor_is_decoded_in_parts():
    layer, x = dense_layer_of(5000, 301, group_size=None), samples(128, 301)
    assert layer.factors[0].codes.numel() > _SLAB
    assert_exact(layer, x)
    assert keeps_nothing(layer)


def test_many_samples_reach_the_gradients_of_scales():
    layer, x = dense_layer_of(200, 300), samples(128)
    layer(x).sum().backward()
    assert layer.factors[0].scales.grad.abs().sum() > 0


@torch.no_grad()
def test_a_dense_factor_with_damaged_groups_is_not_read():
    layer, x = dense_layer_of(200, 300), samples(1)
    expected = layer(x)
    layer.factors[0].groups[1] += 1
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert not keeps_nothing(layer)


@pytest.mark.parametrize("order", [1, -1])
@torch.no_grad()
def test_dense_and_sparse_factors_are_read_together(order):
    rng = np.random.default_rng(0)
    dense = DenseFactor(rng.standard_normal((200, 200), dtype=np.float32))
    factors = [dense, sparse(200, 200, 0.1)][::order]
    layer = FactorizedLinear(FactorProduct(factors).quantized(4)).eval()
    assert_exact(layer, samples(1, 200))
    assert keeps_nothing(layer)


@torch.no_grad()
def test_another_coding_can_be_loaded():
    layer, x = layer_of(8, 64), samples(3)
    layer(x)
    other = layer_of(3, 16)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert_exact(layer, x)


@torch.no_grad()
def test_damaged_groups_are_not_read():
    layer, x = layer_of(), samples(1)
    expected = layer(x)
    layer.factors[0].groups.add_(1 << 20)  # not part of a state dict, but a buffer
    assert torch.allclose(layer(x), expected)


@torch.no_grad()
def test_kinds_can_be_mixed():
    product = FactorProduct([sparse(200, 150, 0.1), sparse(150, 300, 0.1, 1)])
    coded = product.quantized(8)
    for factors in ((product.factors[0], coded.factors[1]), (coded.factors[0], product.factors[1])):
        assert_exact(FactorizedLinear(FactorProduct(factors)).eval(), samples(5))


@pytest.mark.parametrize("n_samples", [1, 20])
@torch.no_grad()
def test_infinity_reaches_only_rows_that_store_its_column(n_samples):
    factor = sparse(200, 150, 0.1)
    layer = FactorizedLinear(FactorProduct([factor]).quantized(8)).eval()
    is_stored = torch.zeros(200 * 150, dtype=torch.bool)
    is_stored[torch.from_numpy(factor.locations)] = True
    x = torch.ones(n_samples, 150)
    for column in range(0, 150, 7):
        x.fill_(1.0)[:, column] = torch.inf
        reached = is_stored.reshape(200, 150)[:, column]
        assert torch.equal(layer(x).isfinite(), ~reached.expand(n_samples, 200))


@pytest.mark.parametrize("n_samples", [1, 64])
@torch.no_grad()
def test_bits_do_not_depend_on_threads(n_samples):
    factors = [sparse(1024, 1024, 0.1, seed) for seed in range(2)]
    product = FactorProduct(factors).quantized(8)
    for layer in (FactorizedLinear(product).eval(), dense_layer_of(1024, 1024)):
        assert_same_bits(layer, samples(n_samples, 1024))
        assert keeps_nothing(layer)


def assert_same_bits(layer, x):
    """Assert that the output is the same with every number of threads."""
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(layer(x))
    torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_scales_can_be_trained():
    layer, x = layer_of(), samples(4)
    layer(x).sum().backward()
    assert layer.factors[0].scales.grad.abs().sum() > 0


@torch.no_grad()
def test_scales_at_odd_addresses_are_not_read_in_place():
    layer, x = layer_of(), samples(1)
    scales = layer.factors[0].scales
    memory = torch.empty(4 * len(scales) + 1, dtype=torch.uint8).numpy()
    shifted = memory[1:].view(np.float32)
    shifted[:] = scales.numpy()
    layer.factors[0].scales = nn.Parameter(torch.from_numpy(shifted))
    assert_exact(layer, x)
    assert layer._host._kept is not None
