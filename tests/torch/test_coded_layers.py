"""Layers of quantized values and of signs: codes are kept, scales are trained."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.func import functional_call  # noqa: E402

from matfact import (  # noqa: E402
    BlockSVD,
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    LowRank,
    MonarchProjector,
    Quantized,
)
from matfact.operators import FactorProduct, QuantizedFactor, SignFactor, SparseFactor  # noqa: E402
from matfact.torch import (  # noqa: E402
    FactorizedLinear,
    SparseProductLinear,
    add_adapters,
    balance_factors,
    fine_tune,
    merge_update,
    randomize_supports,
    reset_parameters,
)

FITS = {
    "sparse": Quantized(DoubleSparseFactorizer(density=0.5, max_iter=5), bits=4, group_size=8),
    "dense": Quantized(LowRank(density=0.5), bits=3, group_size=5),
    "monarch": Quantized(MonarchProjector(density=0.6), bits=4),
    "blocks": Quantized(BlockSVD(density=0.6), bits=8),
    "signs": DoubleBinaryFactorizer(bits=8, max_iter=5),
}


def product(name, shape=(18, 12)):
    W = np.random.default_rng(0).standard_normal(shape)
    return FITS[name].fit(W).operator_


@pytest.fixture(params=FITS)
def layer(request):
    bias = torch.arange(18.0, dtype=torch.float64)
    return FactorizedLinear(product(request.param), bias)


def inputs(layer, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, layer.in_features, generator=generator, dtype=dtype)


def test_output_is_that_of_the_product_in_every_mode(layer):
    x = inputs(layer, 4, 3)
    dense = layer.to_product().toarray()
    expected = x @ torch.as_tensor(dense).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, torch.as_tensor(dense))
    torch.testing.assert_close(layer.to_dense()(x), expected)
    for inference in ("auto", "dense", "factors"):
        layer.inference = inference
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("name", FITS)
def test_a_product_comes_back_to_the_bit(name):
    before = product(name)
    after = FactorizedLinear(before).to_product()
    assert np.array_equal(before.toarray(), after.toarray())
    for old, new in zip(before, after, strict=True):
        assert type(old) is type(new)
        assert new.value_nbytes() == old.value_nbytes()
        if isinstance(old, QuantizedFactor):
            assert (new.bits, new.group_size) == (old.bits, old.group_size)
            assert type(new.pattern) is type(old.pattern)


def test_gradients_are_those_of_finite_differences(layer):
    names = [name for name, _ in layer.named_parameters()]
    assert all(name == "bias" or name.endswith("scales") for name in names)

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,)).sin()

    arguments = (inputs(layer, 2).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(output, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, arguments, fast_mode=True)


def test_eval_mode_follows_changes_of_scales_and_codes(layer):
    x = inputs(layer, 5)
    with torch.no_grad():
        before = layer.eval()(x)
        layer.chain[0].scales.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
        held = [buffer for buffer in layer.buffers() if buffer.dtype in (torch.int8, torch.uint8)]
        held[0].zero_()
        torch.testing.assert_close(layer(x), layer.train()(x))


def test_a_step_of_training_changes_scales_and_no_code(layer):
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x, y = inputs(layer, 64), torch.zeros(64, 18, dtype=torch.float64)
    before = torch.nn.functional.mse_loss(layer(x), y).item()
    loss = lambda output, batch: torch.nn.functional.mse_loss(output, batch[1])  # noqa: E731
    fine_tune(layer, [(x, y)], loss, optimizer=optimizer, epochs=2)
    assert torch.nn.functional.mse_loss(layer(x), y).item() < before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in layer.named_buffers())


def test_copies_pickles_and_state_dicts_compute_the_same(layer):
    x = inputs(layer, 5)
    with torch.no_grad():
        expected = layer.eval()(x)
        other = copy.deepcopy(layer)
        for buffer in other.buffers():
            buffer.zero_() if buffer.dtype == torch.int8 else None
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions_keep_the_codes(layer, dtype):
    x = inputs(layer, 5)
    half = copy.deepcopy(layer).to(dtype)
    kept = {name: buffer.dtype for name, buffer in layer.named_buffers() if name[-6:] != "values"}
    found = {name: buffer.dtype for name, buffer in half.named_buffers() if name in kept}
    assert found == kept
    assert not any(kind.is_floating_point for kind in kept.values())
    with torch.no_grad():
        for training in (True, False):
            found = half.train(training)(x.to(dtype))
            assert found.dtype == dtype
            error = torch.linalg.norm(found.double() - layer(x)) / torch.linalg.norm(layer(x))
            assert error < 16 * torch.finfo(dtype).eps


def test_state_dicts_are_small():
    layer = FactorizedLinear(product("signs", (128, 96)).astype(np.float32))
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    # One bit a sign, one byte and a share of a scale of 32 bits for each row and inner dimension.
    n_signs = sum(factor.nnz for factor in layer.to_product() if isinstance(factor, SignFactor))
    diagonals = sum(f.nnz for f in layer.to_product() if isinstance(f, QuantizedFactor))
    assert stored < n_signs / 8 + 1.5 * diagonals + 100


@pytest.mark.parametrize("name", ["sparse", "signs"])
def test_compiled_and_exported_layers_compute_the_same(name):
    layer = FactorizedLinear(product(name))
    x = inputs(layer, 5)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sparse", "signs"])
def test_onnx_export_computes_the_same(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = FactorizedLinear(product(name).astype(np.float32)).eval()
    x = inputs(layer, 4, dtype=torch.float32)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x).detach(), rtol=1e-4, atol=1e-5)


def test_transformed_code_differentiates_inputs(layer):
    x = inputs(layer, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
        _, tangent = torch.func.jvp(layer.eval(), (x,), (x,))
        torch.testing.assert_close(tangent, x @ layer.weight.T)


def test_a_state_dict_brings_its_support_and_groups_along():
    drawn = {"dtype": torch.float64, "random_state": 0}
    sparse = [SparseProductLinear(12, 18, density=d, **drawn).to_product() for d in (0.4, 0.6)]
    source = FactorizedLinear(sparse[0].quantized(4, group_size=2))
    target = FactorizedLinear(sparse[1].quantized(6, group_size=None))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs(source, 3)), source(inputs(source, 3)))
    assert [(f.bits, f.group_size) for f in target.to_product()] == [(4, 2)] * 2


def test_scales_that_fit_no_groups_are_refused():
    layer = FactorizedLinear(product("dense"))
    state = layer.state_dict()
    state["factors.0.scales"] = state["factors.0.scales"][:-1]
    with pytest.raises(RuntimeError, match="scales must hold one number for each of"):
        layer.load_state_dict(state)


def test_values_out_of_order_are_refused():
    swapped = SparseFactor(np.array([1.0, 2.0]), np.array([1, 0]), np.array([0, 2]), 2)
    with pytest.raises(ValueError, match="in the order of their positions"):
        FactorizedLinear(FactorProduct([swapped]).quantized(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: add_adapters(torch.nn.Sequential(layer), rank=1),
        lambda layer: merge_update(layer, torch.zeros(18, 12, dtype=torch.float64)),
        lambda layer: reset_parameters(layer),
        lambda layer: randomize_supports(layer),
    ],
    ids=["adapters", "update", "reset", "supports"],
)
def test_what_would_change_codes_is_refused(layer, change):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="stores codes of few bits"):
        change(layer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_balanced_factors_compute_the_same(layer):
    x = inputs(layer, 3)
    expected = layer(x)
    with torch.no_grad():
        layer.chain[0].scales.mul_(16)
        layer.chain[-1].scales.div_(16)
    before = [float(f.norm) for f in layer.to_product() if isinstance(f, QuantizedFactor)]
    torch.testing.assert_close(balance_factors(layer)(x), expected)
    after = [float(f.norm) for f in layer.to_product() if isinstance(f, QuantizedFactor)]
    assert max(after) / min(after) < max(before) / min(before)
