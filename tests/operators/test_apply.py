"""Products applied by the kernels, by the dense matrix and by plain operations agree."""

import ast
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact._threads import limited_kernels
from matfact.kernels import fused
from matfact.operators import (
    Advice,
    BlockSparseFactor,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    SelectionFactor,
    SparseFactor,
)
from matfact.operators._dispatch import cost

KINDS = ("dense", "csr", "kronecker", "butterfly", "blocks", "selection")


def normal(shape, rng, dtype):
    """Return random normal numbers, complex ones where `dtype` is."""
    values = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(dtype)


def random_factor(kind, rows, columns, rng, dtype):
    """Return a random factor of about `rows` × `columns`, ragged wherever its storage allows."""

    def random(*shape):
        return normal(shape, rng, dtype)

    if kind == "dense":
        return DenseFactor(random(rows, columns))
    if kind == "csr":
        dense = np.where(rng.random((rows, columns)) < rng.random(), random(rows, columns), 0)
        return SparseFactor.from_dense(dense.astype(dtype))
    if kind == "kronecker":
        a, c, d = 3, 5, int(rng.choice([max(1, columns // 15), 16, 1]))
        return KroneckerSparseFactor(random(a, d, int(rng.integers(1, 9)), c))
    if kind == "butterfly":
        d = int(rng.choice([1, 2, 8]))
        return KroneckerSparseFactor(random(max(1, columns // (2 * d)), d, 2, 2))
    if kind == "blocks":
        cuts = np.sort(rng.integers(0, rows, 3))
        spans = [(cuts[0], cuts[1]), (cuts[1], cuts[2]), (0, rows)]
        lefts = [0, 0, columns // 2]
        widths = [columns // 3, columns // 2, columns - columns // 2]
        arrays = [random(b - a, w) for (a, b), w in zip(spans, widths, strict=True)]
        corners = [(int(a), left) for (a, _), left in zip(spans, lefts, strict=True)]
        return BlockSparseFactor.from_blocks(arrays, corners, (rows, columns), like=arrays[0])
    index = rng.permutation(columns)[:rows]
    index = np.where(rng.random(len(index)) < 0.2, -1, index)
    return SelectionFactor.from_index(index, columns, like=np.zeros(0, dtype))


def random_product(kinds, rng, dtype, side=140):
    """Return a chain of random factors that begins with a dense one, so that it is not tiny."""
    factors = []
    columns = side + int(rng.integers(20))
    for kind in kinds:
        factor = random_factor(kind, int(rng.integers(90, side)), columns, rng, dtype)
        if factor.shape[1] != columns:
            crop = SelectionFactor.from_index(
                np.arange(factor.shape[1]) % columns, columns, like=np.zeros(0, dtype)
            )
            factors.insert(0, crop)
        factors.insert(0, factor)
        columns = factor.shape[0]
    factors.insert(0, DenseFactor(normal((side, columns), rng, dtype)))
    return FactorProduct(factors)


@pytest.fixture
def by_factors(monkeypatch):
    monkeypatch.setattr(cost, "factors_pay", lambda *_: True)


@pytest.fixture
def sparse_pair():
    rng = np.random.default_rng(0)
    return FactorProduct([random_factor("csr", 200, 200, rng, np.float32) for _ in range(2)])


def error(found, product, X):
    """Return the largest error ÷ what rounding allows in the dtype of the result."""
    is_complex = np.iscomplexobj(X) or np.iscomplexobj(product[0].values)
    wide = [factor.astype(np.complex128 if is_complex else np.float64) for factor in product]
    exact, bound = X.astype(wide[0].dtype), np.abs(X).astype(np.float64)
    for factor in reversed(wide):
        exact = factor.apply(exact)
        bound = factor.with_values(np.abs(factor.values)).apply(bound)
    unit = np.finfo(found.dtype).eps * len(wide) * 20
    return float(np.max(np.abs(found - exact) / (unit * bound + np.finfo(found.dtype).tiny)))


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, np.complex64]),
    batch=st.sampled_from([1, 2, 15, 16, 17, 40, 64, 65, 150]),
    order=st.sampled_from("CF"),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_kernels_agree_with_the_factors(kinds, dtype, batch, order, threads, seed):
    rng = np.random.default_rng(seed)
    product = random_product(kinds, rng, dtype)
    computed = np.result_type(np.float32, dtype)
    for operator in (product, product.T):
        X = np.asarray(normal((operator.shape[1], batch), rng, computed), order=order)
        program = operator._plan._program(computed)
        found = program.apply(X, threads)
        np.testing.assert_array_equal(found, program.apply(X, 1))
        assert found.dtype == computed
        assert error(found, operator, X) < 1


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_may_be_of_any_length(dtype, batch):
    rng = np.random.default_rng(batch)
    lengths = np.concatenate([[0, 300, 299, 1], rng.integers(0, 40, 60), np.full(60, 20), [0] * 9])
    dense = np.zeros((len(lengths), 300), np.float32)
    for row, length in zip(dense, lengths, strict=True):
        row[rng.permutation(300)[:length]] = rng.standard_normal(length)
    dense[5, dense[5] != 0] = np.finfo(dtype).smallest_subnormal  # of which no half can be stored
    dense = dense.astype(dtype)
    product = FactorProduct([SparseFactor.from_dense(dense)])
    X = rng.standard_normal((300, batch)).astype(np.float32)
    X[-1] = np.inf  # reaches only rows that hold a value there
    found = product._plan._program(X.dtype).apply(X)
    is_reached = dense[:, -1] != 0
    assert np.isinf(found[is_reached]).all()
    assert 0 < is_reached.sum() < len(lengths)
    X[-1] = 0
    exact = dense.astype(np.float64) @ X.astype(np.float64)
    np.testing.assert_allclose(found[~is_reached], exact[~is_reached], rtol=0, atol=1e-4)


def test_batches_come_out_in_the_layout_they_came_in(sparse_pair, by_factors):
    X = np.ones((30, 200), np.float32)
    assert (sparse_pair @ X.T).T.flags.c_contiguous
    assert (sparse_pair @ np.ascontiguousarray(X.T)).flags.c_contiguous
    assert (X @ sparse_pair).flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("is_dense", [True, False])
def test_real_factors_take_complex_operands(dtype, is_dense, sparse_pair, monkeypatch):
    monkeypatch.setattr(cost, "factors_pay", lambda *_: not is_dense)
    X = normal((200, 6), np.random.default_rng(1), dtype)
    for operand in (X, np.asfortranarray(X), X[:, ::2], X[:, 0], X[:, :0]):
        found = sparse_pair @ operand
        assert found.dtype == dtype
        assert found.shape == (200, *operand.shape[1:])
        if found.size:
            columns = (200, -1)
            assert error(found.reshape(columns), sparse_pair, operand.reshape(columns)) < 1


def test_vectors_empty_batches_views_and_read_only_operands_are_taken(sparse_pair, by_factors):
    X = np.random.default_rng(1).standard_normal((400, 60)).astype(np.float32)
    assert (sparse_pair @ X[:200, :0]).shape == (200, 0)
    view = X[::2, ::3]
    np.testing.assert_array_equal(sparse_pair @ view, sparse_pair @ view.copy())
    np.testing.assert_allclose(sparse_pair @ view[:, 0], (sparse_pair @ view)[:, 0], rtol=1e-4)
    fixed = view.copy()
    fixed.flags.writeable = False
    np.testing.assert_array_equal(sparse_pair @ fixed, sparse_pair @ view)


def test_factors_without_inner_dimension_give_zeros(by_factors):
    empty = [DenseFactor(np.ones(shape, np.float32)) for shape in ((150, 0), (0, 150))]
    product = FactorProduct(empty)
    np.testing.assert_array_equal(product @ np.ones((150, 20), np.float32), np.zeros((150, 20)))
    np.testing.assert_array_equal(product @ np.ones(150, np.float32), np.zeros(150))


@pytest.mark.parametrize("batch", [1, 20])
def test_wider_operands_are_computed_with_in_their_dtype(sparse_pair, batch, by_factors):
    X = np.random.default_rng(1).standard_normal((200, batch))
    found = sparse_pair @ X
    assert found.dtype == np.float64
    assert error(found, sparse_pair, X) < 1


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">c16", np.longdouble])
@pytest.mark.parametrize("side", [60, 200])
def test_operands_of_foreign_byte_order_and_width_are_converted(dtype, side):
    rng = np.random.default_rng(1)
    product = FactorProduct([random_factor("csr", side, side, rng, np.float32)])
    X = rng.standard_normal((side, 5)).astype(dtype)
    native = X.astype(np.float64 if X.dtype == np.longdouble else X.dtype.newbyteorder("="))
    found, expected = product @ X, product @ native
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    stored = FactorProduct([f.with_values(f.values.astype(">f4")) for f in product])
    np.testing.assert_allclose(stored @ native, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(200,), (200, 1), (200, 7), (200, 0)])
def test_prepared_calls_do_what_calls_do(shape, sparse_pair):
    program = sparse_pair._plan._program(np.dtype(np.float32))
    X = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)[1]
    fixed = X.copy()
    fixed.flags.writeable = False
    for operand in (X, np.asfortranarray(X), fixed):
        found = program.prepared(shape)(operand)
        np.testing.assert_array_equal(found, program.apply(operand, 1))
        assert found.strides == program.apply(operand, 1).strides


def test_limits_on_threads_hold_for_calls_prepared_before(sparse_pair, by_factors, monkeypatch):
    X = np.ones((200, 999), np.float32)
    sparse_pair @ X
    used = []
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda *a: used.append(a[-1]) or run(*a))
    with limited_kernels(1):
        sparse_pair @ X
    assert used == [1]


_PRODUCTS = """
import hashlib
import numpy as np
from matfact.operators import *
rng = np.random.default_rng(0)
def sparse(rows, columns, density):
    dense = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < density)
    return SparseFactor.from_dense(dense)
def dense(rows, columns):
    return DenseFactor(rng.standard_normal((rows, columns)))
for product in (
    FactorProduct([sparse(48, 48, 0.1), sparse(48, 48, 0.1)]),
    FactorProduct([sparse(200, 200, 0.1), sparse(200, 300, 0.1)]),
    FactorProduct([sparse(200, 200, 0.9), sparse(200, 300, 0.9)]),
    FactorProduct([dense(20, 700), dense(700, 30)]),
    FactorProduct([dense(1, 90), dense(90, 60)]).astype(complex),
):
    for shape in ((), (16,), (300,)):
        X = rng.standard_normal((product.shape[1], *shape)).astype(product.dtype)
        print([hashlib.sha256(np.ascontiguousarray(product @ X)).hexdigest() for _ in range(3)])
"""


def test_products_repeat_to_the_bit_in_every_process_for_any_number_of_threads():
    found = set()
    for kernels, blas in ((1, 2), (2, 1), (3, 3)):
        threads = {"NUMBA_NUM_THREADS": str(kernels), "OPENBLAS_NUM_THREADS": str(blas)}
        run = subprocess.run(
            [sys.executable, "-c", _PRODUCTS], env=os.environ | threads, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        found.add(run.stdout)
    (lines,) = found
    digests = [ast.literal_eval(line) for line in lines.splitlines()]
    assert len(digests) == 15
    assert all(len(set(repeated)) == 1 for repeated in digests)


def test_a_product_goes_the_same_way_however_often_it_was_applied(sparse_pair):
    X = np.random.default_rng(1).standard_normal((200, 20)).astype(np.float32)
    first = sparse_pair @ X
    sparse_pair.advise(20)
    sparse_pair @ X[:, :3]
    np.testing.assert_array_equal(sparse_pair @ X, first)
    np.testing.assert_array_equal(FactorProduct(sparse_pair.factors) @ X, first)


def test_the_dense_matrix_is_used_where_it_is_less_work_and_never_pickled():
    rng = np.random.default_rng(0)
    full = DenseFactor(rng.standard_normal((200, 200)).astype(np.float32))
    product = FactorProduct([full, full])
    size = len(pickle.dumps(product))
    X = np.eye(200, dtype=np.float32)
    np.testing.assert_array_equal(product @ X, product._plan._densified(X.dtype))
    assert product._plan._dense_programs
    assert len(pickle.dumps(product)) == size
    for again in (pickle.loads(pickle.dumps(product)), copy.deepcopy(product)):
        np.testing.assert_array_equal(again @ X, product @ X)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_small_products_become_dense_unless_factors_save_much(dtype):
    rng = np.random.default_rng(0)
    low_rank = [DenseFactor(normal(shape, rng, dtype)) for shape in ((100, 2), (2, 100))]
    for factors, batch, is_dense in (
        ([random_factor("csr", 100, 100, rng, dtype)], 7, True),
        (low_rank, 7, True),
        (low_rank, 4096, False),
    ):
        product, X = FactorProduct(factors), normal((100, batch), rng, dtype)
        found = product @ X
        assert error(found, product, X) < 1
        assert bool(product._plan._dense) == is_dense
        np.testing.assert_array_equal(product @ X, found)
        np.testing.assert_array_equal(product @ X[:, 0], product @ X[:, 0].copy())


def test_advice_times_both_ways_and_names_the_faster(sparse_pair):
    advice = sparse_pair.advise(8)
    assert min(advice.factors_seconds, advice.dense_seconds) > 0
    assert advice.speedup == pytest.approx(advice.dense_seconds / advice.factors_seconds)
    assert advice.seconds == min(advice.factors_seconds, advice.dense_seconds)
    assert "use dense: at batch size 8" in repr(Advice(8, 2.0, 1.0))
    assert "use the factors" in repr(Advice(8, 1.0, 2.0))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "16"])
def test_advice_refuses_what_is_no_batch_size(sparse_pair, batch_size):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        sparse_pair.advise(batch_size)


def test_advice_measures_what_the_kernels_do_not_serve(sparse_pair):
    torch = pytest.importorskip("torch")
    small = FactorProduct([DenseFactor(np.ones((64, 64))), DenseFactor(np.ones((64, 64)))])
    factors = [f.with_values(torch.tensor(f.values, requires_grad=True)) for f in sparse_pair]
    for product in (small, FactorProduct(factors)):
        advice = product.advise(3)
        assert min(advice.factors_seconds, advice.dense_seconds) > 0


def test_threads_may_share_a_product(sparse_pair, by_factors):
    rng = np.random.default_rng(1)
    operands = [rng.standard_normal((200, 300)).astype(np.float32) for _ in range(4)]
    expected = [sparse_pair @ X for X in operands]
    wrong = []

    def work(X, result):
        for _ in range(20):
            found = sparse_pair._plan._program(X.dtype).apply(X, 3)
            wrong.append(not np.array_equal(found, result))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(operands, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 80


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("batch", [1, 20])
def test_tensors_on_the_host_use_the_kernels_and_are_not_copied(dtype, batch, by_factors):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    numpy_product = random_product(["csr", "kronecker", "selection"], rng, np.float32)
    dtype = getattr(torch, dtype)
    product = FactorProduct(
        [f.with_values(torch.from_numpy(f.values).to(dtype)) for f in numpy_product]
    )
    rounded = FactorProduct([f.with_values(f.values.double().numpy()) for f in product])
    X = rng.standard_normal((product.shape[1], batch)).astype(np.float32)
    for operator, exact in ((product, rounded), (product.T, rounded.T)):
        operand = rng.standard_normal((operator.shape[1], batch)).astype(np.float32)
        found = operator @ torch.from_numpy(operand)
        assert operator._plan is not None
        assert isinstance(found, torch.Tensor)
        assert error(found.numpy().astype(np.float32), exact, operand) < 1
    assert (product @ torch.from_numpy(X).to(dtype)).dtype == dtype


def test_tensors_that_were_written_to_are_prepared_anew(sparse_pair, by_factors):
    torch = pytest.importorskip("torch")
    tensors = FactorProduct([f.with_values(torch.from_numpy(f.values.copy())) for f in sparse_pair])
    X = torch.ones(200, 3)
    before = tensors @ X
    tensors[0].values.mul_(2)
    torch.testing.assert_close(tensors @ X, 2 * before)


def test_gradients_flow_through_the_operations_of_torch(sparse_pair):
    torch = pytest.importorskip("torch")
    tensors = FactorProduct([f.with_values(torch.from_numpy(f.values)) for f in sparse_pair])
    X = torch.ones(200, 3, requires_grad=True)
    (tensors @ X).sum().backward()
    expected = sparse_pair.T @ np.ones((200, 3), np.float32)
    torch.testing.assert_close(X.grad, torch.from_numpy(expected), rtol=1e-4, atol=1e-3)


def _apply_in_child(program, X, queue):
    queue.put(program.apply(X, 2))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_products_can_be_applied_after_a_fork(sparse_pair, by_factors):
    X = np.ones((200, 40), np.float32)
    program = sparse_pair._plan._program(X.dtype)
    expected = program.apply(X, 2)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_apply_in_child, args=(program, X, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(), expected)
    child.join(30)
    assert child.exitcode == 0


def test_the_compiler_is_not_loaded_for_small_products():
    code = """
import sys
import numpy as np
from matfact.operators import FactorProduct, SparseFactor
rng = np.random.default_rng(0)
for side in (100, 200):
    dense = rng.random((side, side)) * (rng.random((side, side)) < 0.2)
    product, X = FactorProduct([SparseFactor.from_dense(dense)]), rng.random((side, 5))
    np.testing.assert_allclose(product @ X, dense @ X, rtol=1e-12)
    assert ("numba" in sys.modules) == (side == 200)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
