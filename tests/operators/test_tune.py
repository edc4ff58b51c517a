"""Tuning applies to a single product, and results stay bit-reproducible."""

import copy
import pickle

import numpy as np
import pytest

from matfact.operators import Advice, DenseFactor, FactorProduct, SparseFactor
from matfact.operators._dispatch import advice as timing


def pair(side, dtype=np.float32, density=0.2):
    rng = np.random.default_rng(side)
    dense = rng.standard_normal((2, side, side)) * (rng.random((2, side, side)) < density)
    return FactorProduct([SparseFactor.from_dense(d.astype(dtype)) for d in dense])


def operand(product, *batch):
    rng = np.random.default_rng(1)
    return rng.standard_normal((product.shape[1], *batch)).astype(product.dtype)


@pytest.fixture
def faster(monkeypatch):
    """Let one of both ways be the faster one, whatever it takes."""

    def let(method):
        times = {"factors": [1.0, 2.0], "dense": [2.0, 1.0]}[method] * 9
        monkeypatch.setattr(timing, "_fastest", lambda call, X: (call(X), times.pop(0))[1])

    return let


@pytest.mark.parametrize("side", [60, 200])
@pytest.mark.parametrize("method", ["factors", "dense"])
def test_the_faster_way_is_kept_for_that_many_columns_alone(side, method, faster):
    product, untuned = pair(side), pair(side)
    faster(method)
    X, other = operand(product, 16), operand(product, 5)
    before, others = product @ X, product @ other
    found = product.tune(16)
    assert (found.batch_size, found.method, found.rule) == (16, method, untuned.method_for(16))
    assert found.changed == (method != untuned.method_for(16))
    assert product.method_for(16) == method
    assert product.method_for(5) == untuned.method_for(5)
    by = product._plan._by(method, X, X.dtype)(X)
    after = product @ X
    np.testing.assert_array_equal(after, by)
    np.testing.assert_array_equal(product @ X, after)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(product @ other, others)
    assert product.tune(16).rule == untuned.method_for(16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
def test_both_ways_round_differently_and_the_one_tuned_to_is_taken(dtype, faster):
    results = []
    for method in ("factors", "dense"):
        product = pair(200, dtype)
        X = operand(product).astype(product._plan.dtype)
        faster(method)
        product.tune(1)
        results.append(product @ X)
        for same in (X, X[:, None], X.copy()):
            np.testing.assert_array_equal((product @ same).reshape(-1), results[-1])
    assert (results[0] != results[1]).any()
    np.testing.assert_allclose(*results, rtol=1e-2, atol=1e-2)


def test_tuning_stays_when_values_are_written_to(faster):
    torch = pytest.importorskip("torch")
    product = FactorProduct([f.with_values(torch.from_numpy(f.values)) for f in pair(200)])
    X = torch.from_numpy(operand(pair(200), 8))
    before, rule = product @ X, product.method_for(8)
    other = "dense" if rule == "factors" else "factors"
    faster(other)
    assert product.tune(8).changed
    product[0].values.mul_(2)
    assert product.method_for(8) == other
    torch.testing.assert_close(product @ X, 2 * before, rtol=1e-4, atol=1e-3)


def test_copies_files_and_products_made_of_it_go_by_the_rule(faster, tmp_path):
    product = pair(200)
    rule = product.method_for(8)
    X, first = operand(product, 8), product @ operand(product, 8)
    faster("dense" if rule == "factors" else "factors")
    product.tune(8)
    assert product.method_for(8) != rule
    product.save(tmp_path / "product.safetensors")
    for again in (
        copy.copy(product), copy.deepcopy(product), pickle.loads(pickle.dumps(product)),
        FactorProduct.load(tmp_path / "product.safetensors"), product.T.T,
    ):  # fmt: skip
        assert again.method_for(8) == rule
        np.testing.assert_array_equal(again @ X, first)


def test_a_dense_matrix_that_is_not_taken_is_not_kept(faster):
    for side in (60, 200):
        product = pair(side)
        faster("factors")
        product.tune(4)
        assert not product._plan._dense
        assert not product._plan._dense_programs


def test_advice_changes_nothing(faster):
    product = pair(200)
    X, rule = operand(product, 8), product.method_for(8)
    first = product @ X
    faster("dense" if rule == "factors" else "factors")
    assert product.advise(8).rule is None
    assert product.method_for(8) == rule
    np.testing.assert_array_equal(product @ X, first)


@pytest.mark.parametrize("side", [100, 400])
def test_what_is_far_faster_is_found_so(side):
    rng = np.random.default_rng(0)
    full = DenseFactor(rng.standard_normal((side, side)))
    several = FactorProduct([full] * 8).tune(256)
    assert (several.method, several.rule, several.changed) == ("dense", "dense", False)
    assert several.seconds > 0


def test_advice_tells_what_tuning_changed():
    assert repr(Advice(8, 1e-6, 2e-6, "dense")).endswith("; changed from the rule: dense")
    assert repr(Advice(8, 1e-6, 2e-6, "factors")).endswith("; as the rule: the factors")
    assert repr(Advice(8, 1e-6, 2e-6)).endswith("speed-up)")
    assert not Advice(8, 1e-6, 2e-6).changed


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "16", None])
def test_batch_sizes_are_checked_first(batch_size):
    product = pair(60)
    for ask in (product.tune, product.method_for):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            ask(batch_size)


def test_products_with_one_way_only_refuse_to_be_tuned():
    torch = pytest.importorskip("torch")
    factors = [f.with_values(torch.tensor(f.values, requires_grad=True)) for f in pair(60)]
    product = FactorProduct(factors)
    assert product.method_for(3) == "factors"
    with pytest.raises(TypeError, match=r"need no gradient .* got Tensor of torch.float32"):
        product.tune(3)
