"""Triton's kernels against products in double precision, by Triton's interpreter.

Run with ``TRITON_INTERPRET=1 pytest tests/torch/test_triton.py``: the interpreter must be chosen
before the kernels are imported.
"""

import importlib.util
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from matfact.operators import DenseFactor, QuantizedFactor, SparseFactor  # noqa: E402
from matfact.torch.layers._chain import factor_module  # noqa: E402

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from matfact.torch.kernels import launch, operators  # noqa: E402

#: Numbers of samples and dtypes: one sample, few, and more than a tile's.
CASES = [
    *((n, torch.float32) for n in (1, 3, 17, 64)),
    *((n, dtype) for n in (3, 17) for dtype in (torch.float16, torch.bfloat16)),
]


@pytest.fixture(autouse=True)
def _dots_of_bfloat16(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 as integers, compiled kernels do not."""
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def assert_close(got, expected, dtype):
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= 4 * torch.finfo(dtype).eps


#: Columns of rows that do not begin at whole bytes of a mask, and that do.
COLUMNS = [77, 88]


def sparse_module(columns=77, rows=13, density=0.3, seed=0):
    """Return a factor with empty rows."""
    rng = np.random.default_rng(seed)
    shape = rows, columns
    W = rng.standard_normal(shape) * (rng.random(shape) < density)
    W[[0, 4, -1]] = 0
    return factor_module(SparseFactor.from_dense(W.astype(np.float32)))


def samples(n, columns, dtype):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_scattered_values_are_multiplied_from_bits_and_by_rows(columns, n, dtype):
    module = sparse_module(columns).to(dtype)
    x = samples(n, module.columns, dtype)
    expected = x.double() @ module.dense().detach().double().T
    values, positions = module.values.detach(), {"indptr": module.indptr}
    tiles = launch.tiles(x, module.rows, values, bits=module.mask, **positions)
    assert_close(tiles, expected, dtype)
    rows = launch.rows(x, module.rows, values, indices=module.indices, **positions)
    assert_close(rows, expected, dtype)


@pytest.mark.parametrize("n", [2, 20])
def test_wide_matrices_and_strided_samples(n):
    module = sparse_module(70_000, 5, density=0.001)
    assert module.indices.dtype == torch.int32
    x = samples(n, 70_000, torch.float32).T.contiguous().T
    expected = x.double() @ module.dense().detach().double().T
    arguments = module.indices, module.indptr
    got = launch.rows(x, 5, module.values.detach(), indices=arguments[0], indptr=arguments[1])
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_codes_are_decoded(columns, n, group_size, is_sparse):
    rng = np.random.default_rng(1)
    pattern = DenseFactor(torch.zeros(13, columns))
    if is_sparse:
        pattern = sparse_module(columns).to_factor()
    module = coded(pattern, group_size, rng)
    x = samples(n, module.columns, torch.float32)
    expected = x.double() @ module.dense().detach().double().T
    codes = (module.scales.detach(), module.groups, module.unit, group_size is not None)
    bits, indptr = (module.mask, module.indptr) if is_sparse else (module.codes, None)
    got = launch.tiles(x, 13, module.codes, bits=bits, indptr=indptr, codes=codes)
    assert_close(got, expected, torch.float32)
    if is_sparse:
        held = {"indices": module.indices, "indptr": module.indptr, "codes": codes}
        assert_close(launch.rows(x, 13, module.codes, **held), expected, torch.float32)


def coded(pattern, group_size, rng):
    shape = tuple(pattern.values.shape)
    levels = torch.from_numpy(rng.integers(-7, 8, shape).astype(np.int8))
    empty = QuantizedFactor(levels, torch.zeros(0), 4, group_size, pattern)
    scales = torch.from_numpy(rng.random(len(empty.bounds) - 1).astype(np.float32)) + 0.5
    return factor_module(QuantizedFactor(levels, scales, 4, group_size, pattern))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_signs_are_multiplied_as_bits(columns, n, dtype):
    rows = 13
    signs = torch.where(samples(rows, columns, torch.float32) < 0, -1.0, 1.0)
    bits = torch.from_numpy(np.packbits(signs.numpy() > 0))
    x = samples(n, columns, dtype)
    got = launch.tiles(x, rows, bits, bits=bits, is_signs=True)
    assert_close(got, x.double() @ signs.double().T, dtype)


@pytest.mark.parametrize("pattern", [(1, 4, 2, 2), (1, 2, 17, 16)])
def test_gradients_of_many_samples_are_added_up(pattern):
    a, d, b, c = pattern
    x, g = samples(300, a * c * d, torch.float16), samples(300, a * b * d, torch.float16)
    inputs, outputs = x.double().reshape(-1, a, c, d), g.double().reshape(-1, a, b, d)
    expected = torch.einsum("nabd,nacd->adbc", outputs, inputs)
    got = launch.kronecker_gradient(x, g, list(pattern))
    assert got.shape == pattern
    assert_close(got, expected, torch.float16)


#: A butterfly, blocks of odd sides, and block-diagonal and strided factors as in Monarch.
PATTERNS = [(1, 8, 2, 2), (3, 5, 4, 3), (2, 1, 33, 20), (1, 2, 70, 18)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "dtype"), CASES)
def test_kronecker_sparse_products_and_gradients(pattern, n, dtype):
    a, d, b, c = pattern
    x, g = samples(n, a * c * d, dtype), samples(n, a * b * d, dtype)
    values = samples(a * d * b, c, dtype).reshape(pattern)
    inputs, outputs = x.double().reshape(n, a, c, d), g.double().reshape(n, a, b, d)
    expected = torch.einsum("adbc,nacd->nabd", values.double(), inputs).reshape(n, -1)
    assert_close(launch.kronecker(x, values), expected, dtype)
    expected = torch.einsum("adbc,nabd->nacd", values.double(), outputs).reshape(n, -1)
    assert_close(launch.kronecker(g.T.contiguous().T, values.mT), expected, dtype)
    expected = torch.einsum("nabd,nacd->adbc", outputs, inputs)
    assert_close(launch.kronecker_gradient(x, g, list(pattern)), expected, dtype)


@pytest.mark.parametrize("road", ["tiles", "rows", "cusparse", "torch"])
def test_operators_on_cuda_compute_the_same_on_each_road(road, monkeypatch):
    monkeypatch.setattr(operators, "_fastest", lambda x, times, factor: road)
    x = samples(3, 88, torch.float32)
    module = sparse_module(88)
    positions = module.mask, module.indices, module.indptr
    got = operators.sparse_on_cuda(x, module.values.detach(), *positions)
    assert_close(got, x.double() @ module.dense().detach().double().T, torch.float32)
    module = coded(module.to_factor(), 5, np.random.default_rng(1))
    held = module.codes, module.scales.detach(), module.groups, module.unit, True
    got = operators.coded_on_cuda(x, *held, *positions)
    assert_close(got, x.double() @ module.dense().detach().double().T, torch.float32)
    signs = module.mask[: 4 * 88 // 8]
    got = operators.sign_on_cuda(x, signs, 4)
    expected = x.double() @ operators.signs_of(signs, 4, 88, torch.float64).T
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("road", ["tiles", "torch"])
def test_operators_of_blocks_on_cuda_compute_the_same_on_each_road(road, monkeypatch):
    monkeypatch.setattr(operators, "_fastest", lambda x, times, factor: road)
    values = samples(2 * 3 * 4, 5, torch.float32).reshape(2, 3, 4, 5)
    x, g = samples(3, 30, torch.float32), samples(3, 24, torch.float32)
    got, expected = operators.kronecker_on_cuda(x, values), operators.kronecker_linear(x, values)
    assert_close(got, expected.double(), torch.float32)
    assert got.stride() == expected.stride()
    got = operators.gradient_on_cuda(x, g, [2, 3, 4, 5])
    expected = operators.kronecker_gradient(x, g, [2, 3, 4, 5])
    assert_close(got, expected.double(), torch.float32)
