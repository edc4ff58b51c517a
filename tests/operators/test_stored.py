"""Files of quantized values, signs and coded positions: every bit comes back."""

import numpy as np
import pytest
import torch

from matfact.operators import (
    BlockSparseFactor,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    QuantizedFactor,
    SelectionFactor,
    SignFactor,
    SparseFactor,
    _storage,
)
from matfact.operators._quantized import group_bounds

PATTERNS = ("thin", "full", "scrambled", "empty", "dense", "no columns", "kronecker", "blocks")


def sparse(rng, shape, density):
    mask = rng.random(shape) < density
    mask[len(mask) // 2] = False  # a row without values
    return SparseFactor.from_dense(mask.astype(np.float32))


def make_pattern(kind, rng):
    ones = np.ones
    if kind in ("thin", "full"):
        return sparse(rng, (40, 70), 0.05 if kind == "thin" else 0.6)
    if kind == "scrambled":
        return SparseFactor(ones(2, np.float32), np.int32([3, 0]), np.array([0, 2]), 4)
    if kind == "empty":
        return SparseFactor.from_dense(np.zeros((40, 70), np.float32))
    if kind in ("dense", "no columns"):
        return DenseFactor(ones((9, 17 if kind == "dense" else 0), np.float32))
    if kind == "kronecker":
        return KroneckerSparseFactor(ones((2, 3, 5, 4), np.float32))
    corners = [(0, 0), (3, 5)]
    return BlockSparseFactor.from_blocks([ones((3, 4)), ones((2, 5))], corners, (8, 12), ones(1))


def quantized(pattern, bits, group_size, rng, dtype=np.float32):
    """Return random levels and scales such as a fit gives."""
    levels = np.sort(rng.choice(np.arange(-127, 128, dtype=np.int8), min(2**bits, 255), False))
    scales = rng.uniform(0.5, 2.0, len(group_bounds(pattern, group_size)) - 1)
    scales = scales.astype(np.float16).astype(dtype) * dtype(2.0**-20 if dtype != np.float16 else 1)
    return QuantizedFactor(
        rng.choice(levels, pattern.values.shape), scales, bits, group_size, pattern
    )


def reloaded(factor, path):
    product = FactorProduct([factor])
    product.save(path)
    assert product.nbytes("stored") == path.stat().st_size
    (loaded,) = FactorProduct.load(path)
    return loaded


def held(factor):
    """Return the bytes of a file without its header."""
    _, *others = _storage.pack([factor])[1]
    return sum(map(len, others))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("group_size", [64, None, 1, 1000])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", PATTERNS)
def test_quantized_factors_come_back_bit_by_bit(kind, bits, group_size, rng, tmp_path):
    for dtype in (np.float16, np.float32, np.float64):
        factor = quantized(make_pattern(kind, rng), bits, group_size, rng, dtype)
        loaded = reloaded(factor, tmp_path / "p.safetensors")
        assert (loaded.bits, loaded.group_size, loaded.dtype) == (bits, group_size, dtype)
        assert (loaded.shape, loaded.pattern.kind) == (factor.shape, factor.pattern.kind)
        np.testing.assert_array_equal(loaded.values, factor.values)
        np.testing.assert_array_equal(loaded.scales, factor.scales)
        np.testing.assert_array_equal(loaded.locations, factor.locations)
        np.testing.assert_array_equal(loaded.toarray(), factor.toarray())


def test_quantized_bfloat16_is_told_and_exact(rng, tmp_path):
    factor = quantized(make_pattern("thin", rng), 4, 64, rng)
    scales = torch.asarray(factor.scales).to(torch.bfloat16)
    pattern = factor.pattern.with_values(torch.ones(factor.nnz, dtype=torch.bfloat16))
    half = QuantizedFactor(torch.asarray(factor.values), scales, 4, 64, pattern)
    loaded = reloaded(half, tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.scales, scales.float().numpy())
    np.testing.assert_array_equal(loaded.values, factor.values)
    assert b'\\"dtype\\":\\"BF16\\"' in (tmp_path / "p.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("scales", "itemsize"),
    [
        ([1.5, 1.0], 2),
        ([2.0**-1074, 2.0**-1070], 2),
        ([2.0**1023, 2.0**1000], 2),
        ([0.0, -0.0], 2),
        ([-3.0, 2.0], 2),
        ([2.0**30, 2.0**-30], 4),
        ([1 / 3, 1.0], 8),
        ([float(np.float32(1 / 3)), 1.0], 4),
    ],
)
def test_scales_take_16_bits_unless_that_would_round_them(scales, itemsize, tmp_path):
    values = np.array([[1, -1], [0, 2]], np.int8)
    pattern = DenseFactor(values.astype(np.float64))
    factor = QuantizedFactor(values, np.array(scales), 2, None, pattern)
    loaded = reloaded(factor, tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.scales, factor.scales)
    assert held(factor) == 1 + 4 + 2 * itemsize


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scales": np.array([np.inf, 1.0])}, "not finite"),
        ({"bits": 9}, "codes of 9 bits"),
        ({"bits": 1}, "codes of 1 bits"),
        ({"values": np.array([[0, 1], [-128, 2]], np.int8)}, "-128"),
        ({"values": np.arange(5, dtype=np.int8)[None, :]}, "5 levels"),
        ({"group_size": 0}, "group size of 0"),
    ],
)
def test_what_files_cannot_hold_is_refused_before_anything_is_written(changes, problem, tmp_path):
    fields = {"values": np.zeros((2, 2), np.int8), "scales": np.ones(2), "bits": 2}
    fields |= {"group_size": None, "pattern": DenseFactor(np.ones((2, 2)))} | changes
    with pytest.raises(ValueError, match=problem):
        FactorProduct([QuantizedFactor(**fields)]).save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_quantized_values_need_a_pattern_with_values(tmp_path):
    pattern = SelectionFactor.from_index([0, 1], 2, like=np.zeros(0))
    factor = QuantizedFactor(np.zeros(0, np.int8), np.zeros(0), 4, None, pattern)
    with pytest.raises(TypeError, match="cannot be stored"):
        FactorProduct([factor]).save(tmp_path / "p.safetensors")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 7), (8, 8), (0, 3), (3, 0), (1, 1)])
def test_signs_come_back_in_one_bit_each(shape, dtype, rng, tmp_path):
    factor = SignFactor.from_dense(rng.standard_normal(shape).astype(dtype))
    loaded = reloaded(factor, tmp_path / "p.safetensors")
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded.toarray(), factor.toarray())
    assert held(factor) == -(-shape[0] * shape[1] // 8)


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.67, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(384, 384), (1536, 200), (3, 70_001), (700, 9), (0, 4), (4, 0)])
def test_scattered_positions_come_back(shape, density, rng, tmp_path):
    mask = rng.random(shape) < density
    values = rng.standard_normal(mask.sum()).astype(np.float16)
    factor = SparseFactor.from_bits(values, np.packbits(mask), shape)
    loaded = reloaded(factor, tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.values, values)
    np.testing.assert_array_equal(loaded.locations, np.flatnonzero(mask))
    assert loaded.shape == shape
    assert loaded.indptr.dtype == np.int64


def entropy(share):
    return -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.67, 0.8, 0.9])
def test_positions_take_little_more_than_their_entropy(density, rng):
    mask = rng.random((384, 384)) < density
    factor = SparseFactor.from_dense(mask.astype(np.float16))
    positions = held(factor) - 2 * factor.nnz
    ideal = mask.size * entropy(mask.mean()) / 8
    assert ideal < positions < (1.03 if density <= 0.8 else 1.05) * ideal
    with_codes = quantized(factor, 4, 64, rng)
    values = with_codes.nnz / 2 + with_codes.scales.size * 2
    assert held(with_codes) < 1.03 * (values + ideal)


def test_a_file_is_little_more_than_values_scales_and_entropy(rng):
    for density in (0.1, 0.25, 0.5):
        factors = [quantized(sparse(rng, (384, 384), density), 4, 64, rng) for _ in range(2)]
        ideal = 0
        for factor in factors:
            share = factor.nnz / 384**2
            ideal += factor.nnz / 2 + 2 * factor.scales.size + 384**2 * entropy(share) / 8
        assert FactorProduct(factors).nbytes("stored") < 1.05 * ideal


def test_memory_to_read_coded_positions_is_that_of_the_factor(rng, tmp_path):
    import tracemalloc

    for density in (0.02, 0.6):
        mask = rng.random((2000, 2000)) < density
        factor = SparseFactor.from_bits(
            np.ones(mask.sum(), np.float16), np.packbits(mask), mask.shape
        )
        FactorProduct([factor]).save(tmp_path / "p.safetensors")
        in_memory = factor.values.nbytes + factor.indices.nbytes + factor.indptr.nbytes
        tracemalloc.start()
        try:
            FactorProduct.load(tmp_path / "p.safetensors")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * in_memory + (4 << 20)
