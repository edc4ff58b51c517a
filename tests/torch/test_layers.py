"""Layers against the dense matrix of their product, and against all that torch does to modules."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.func import functional_call  # noqa: E402

from matfact import BlockSVD, DoubleSparseFactorizer, MonarchProjector  # noqa: E402
from matfact.operators import DenseFactor, FactorProduct  # noqa: E402
from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    ButterflyLinear,
    FactorizedConv,
    FactorizedLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    randomize_supports,
    reset_parameters,
)
from matfact.torch.layers._chain import apply_factors  # noqa: E402
from matfact.torch.layers.structured import KaleidoscopeLinear  # noqa: E402

LAYERS = {
    "sparse": lambda **kw: SparseProductLinear(12, 18, **kw),
    "butterfly": lambda **kw: ButterflyLinear(12, 18, **kw),
    "kaleidoscope": lambda **kw: KaleidoscopeLinear(12, 18, **kw),
    "monarch": lambda **kw: MonarchLinear(12, 18, rank=2, **kw),
    "padded": lambda **kw: MonarchLinear(13, 19, n_blocks=3, **kw),
    "blocks": lambda **kw: BlockLowRankLinear(12, 19, grid=(2, 3), rank=2, **kw),
    "lowrank": lambda **kw: LowRankLinear(12, 18, rank=3, **kw),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param](random_state=0, dtype=torch.float64)


def inputs(layer, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, layer.in_features, generator=generator, dtype=torch.float64)


def test_output_is_that_of_the_dense_product(layer):
    x = inputs(layer, 4, 3)
    expected = x @ layer.to_product().toarray().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_dense()(x), expected)
    torch.testing.assert_close(layer.weight, layer.to_product().toarray())


@pytest.mark.parametrize("inference", ["auto", "dense", "factors"])
def test_eval_mode_computes_the_same_and_follows_changes(layer, inference):
    layer.inference = inference
    x = inputs(layer, 5)
    with torch.no_grad():
        for change in (lambda v: v.mul_(2), lambda v: v.add_(0.1)):
            expected = layer.train()(x)
            torch.testing.assert_close(layer.eval()(x), expected)
            for parameter in layer.parameters():
                change(parameter)


@pytest.mark.parametrize(
    ("side", "density", "method"), [(80, 0.9, "dense"), (200, 0.9, "dense"), (200, 0.1, "factors")]
)
def test_eval_mode_leaves_the_dense_way_to_torch(side, density, method, monkeypatch):
    layer = SparseProductLinear(side, side, density=density, random_state=0).eval()
    x = torch.randn(3, 4, side, generator=torch.Generator().manual_seed(0))
    applied = []
    apply = FactorProduct.__matmul__
    monkeypatch.setattr(FactorProduct, "__matmul__", lambda *a: applied.append(1) or apply(*a))
    assert layer.to_product().method_for(12) == method
    with torch.inference_mode():
        found = layer(x)
    assert not applied  # sparse factors are read as they are stored
    assert (layer._host._kept is None) == (method == "factors")
    with torch.no_grad():
        torch.testing.assert_close(found, layer.to_dense()(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x), found)
        layer.factors[0].values.mul_(2)
        torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-4)


def test_values_are_shared_with_the_product_on_request(layer):
    product = layer.to_product()
    for copied in (True, False):
        again = FactorizedLinear(product, copy=copied).to_product()
        for before, after in zip(product, again, strict=True):
            if before.nnz:
                assert (before.values.data_ptr() == after.values.data_ptr()) != copied


def test_gradients_reach_inputs_and_tangents_pass_in_eval_mode(layer):
    layer.eval().requires_grad_(False)
    x = inputs(layer, 5)
    expected = torch.ones(5, layer.out_features, dtype=x.dtype) @ layer.weight
    free = x.clone().requires_grad_()
    layer(free).sum().backward()
    torch.testing.assert_close(free.grad, expected)
    with torch.no_grad():
        _, tangent = torch.func.jvp(layer, (x,), (x,))
        torch.testing.assert_close(tangent, x @ layer.weight.T)
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_gradients_are_those_of_finite_differences(layer):
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = (inputs(layer, 2).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(output, arguments, fast_mode=True)


@pytest.mark.parametrize("batch", [1, 3, 40, 100])
def test_kernels_have_the_gradients_of_torch(layer, batch):
    parameters = [p for p in layer.parameters() if p.numel()]
    x = inputs(layer, batch).requires_grad_()
    apart = apply_factors(layer.chain, x) + layer.bias
    found = [torch.autograd.grad(y.sin().sum(), [x, *parameters]) for y in (layer(x), apart)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_can_be_written_to_before_gradients_are_asked_for(layer, training):
    """As those of torch's own layers: by sums with what skips a layer, and activations in place."""
    layer.bias = None
    layer.train(training)
    parameters = [p for p in layer.parameters() if p.numel()]
    apart = torch.autograd.grad(layer(inputs(layer, 4)).tanh().sum(), parameters)
    in_place = torch.autograd.grad(layer(inputs(layer, 4)).tanh_().sum(), parameters)
    torch.testing.assert_close(in_place, apart)


def test_threads_change_gradients_by_rounding_alone(monkeypatch):
    monkeypatch.setattr("matfact.torch.layers._autograd._WORK", 1)
    monkeypatch.setattr("matfact.torch.layers._autograd.allowed_threads", lambda: 3)
    layer = SparseProductLinear(30, 40, density=0.3, random_state=0, dtype=torch.float64)
    x = inputs(layer, 10).requires_grad_()
    found = []
    for threads in (3, 1):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        found.append(torch.autograd.grad(layer(x).sin().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*found)


def test_gradients_of_gradients_are_those_of_finite_differences(layer):
    x = inputs(layer, 2).requires_grad_()
    parameters = [p for p in layer.parameters() if p.numel()]  # as they are: kernels apply

    def output(x, *values):
        return layer(x).sin()

    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(output, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("frozen", [0, -1])
def test_what_is_frozen_gets_no_gradient(layer, frozen):
    parameters = [p for p in layer.parameters() if p.numel()]
    parameters[frozen].requires_grad_(False)
    layer(inputs(layer, 3)).sum().backward()
    assert [p.grad is not None for p in parameters] == [p.requires_grad for p in parameters]


@pytest.mark.parametrize("build", [ButterflyLinear, KaleidoscopeLinear])
def test_large_batches_take_joined_factors_to_the_same_values_and_gradients(build):
    layer = build(40, 64, random_state=0, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.numel()]
    found = []
    for size in (50, 1):  # with one sample at a time, factors are applied one by one
        pieces = [layer(piece) for piece in inputs(layer, 50).split(size)]
        output = torch.cat(pieces)
        found.append([output, *torch.autograd.grad(output.sin().sum(), parameters)])
    torch.testing.assert_close(*found)


def test_copies_pickles_and_state_dicts_compute_the_same(layer):
    x = inputs(layer, 5)
    with torch.no_grad():
        expected = layer.eval()(x)  # fills the cache, which copies must not share
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(twin(x), expected)
            twin.factors[0].values.mul_(2) if twin.factors[0].values.numel() else None
            torch.testing.assert_close(layer(x), expected)
        other = copy.deepcopy(layer)
        reset_parameters(other, random_state=1)
        assert not torch.allclose(other(x), expected)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), expected)


def test_half_precision_computes_nearly_the_same(layer):
    x = inputs(layer, 5)
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    error = torch.linalg.norm(half.double() - layer(x)) / torch.linalg.norm(layer(x))
    assert error < 16 * torch.finfo(torch.bfloat16).eps


def test_exported_layers_compute_the_same(layer):
    x = inputs(layer, 5)
    torch.testing.assert_close(torch.export.export(layer.eval(), (x,)).module()(x), layer(x))


@pytest.mark.parametrize("name", ["sparse", "padded", "blocks"])
def test_compiled_layers_compute_the_same(name):
    layer = LAYERS[name](random_state=0, dtype=torch.float64)
    x = inputs(layer, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sparse", "monarch"])
def test_onnx_export_computes_the_same(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = LAYERS[name](random_state=0).eval()
    x = torch.randn(4, layer.in_features)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "factorizer",
    [DoubleSparseFactorizer(max_iter=5), BlockSVD(blocking=(2, 2)), MonarchProjector()],
    ids=lambda factorizer: type(factorizer).__name__,
)
def test_a_linear_layer_is_factorized_as_its_weight_is(factorizer):
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 24)
    layer = FactorizedLinear.from_linear(linear, factorizer)
    W_hat = factorizer.fit(linear.weight.detach().numpy()).operator_.toarray()
    np.testing.assert_allclose(layer.to_product().toarray(), W_hat, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.bias, linear.bias)


def test_a_sparse_state_dict_brings_its_support_along():
    source = SparseProductLinear(12, 18, density=0.4, random_state=0)
    target = SparseProductLinear(12, 18, density=0.2, random_state=1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(target(x), source(x))


def test_supports_survive_an_optimizer_with_momentum_and_weight_decay():
    layer = SparseProductLinear(12, 18, random_state=0)
    supports = [factor.locations for factor in layer.to_product().factors]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
    for before, factor in zip(supports, layer.to_product().factors, strict=True):
        np.testing.assert_array_equal(factor.locations, before)


def test_complex_factors_are_applied():
    W = np.fft.fft(np.eye(16))
    layer = FactorizedLinear(MonarchProjector(n_blocks=4, rank=4).fit(W).operator_)
    x = torch.randn(3, 16, dtype=torch.complex128)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_drawn_values_give_outputs_of_the_variance_he_et_al_aim_at(shape):
    layer = SparseProductLinear(*shape, density=0.25, random_state=0)
    outputs = layer(torch.randn(2000, shape[0], generator=torch.Generator().manual_seed(0)))
    assert 0.5 < float(outputs.detach().var()) / 2.0 < 2.0


def test_random_supports_have_as_many_values_elsewhere():
    layer = SparseProductLinear(32, 32, density=0.2, random_state=0)
    before = layer.to_product()
    after = randomize_supports(layer, random_state=1).to_product()
    assert [f.nnz for f in after] == [f.nnz for f in before]
    assert any((a.locations != b.locations).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("shape", [(8, 8), (30, 7), (7, 30), (64, 48)])
@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_random_sparse_layers_never_exceed_the_density(shape, density):
    layer = SparseProductLinear(*shape, density=density, random_state=0)
    assert layer.to_product().nnz <= density * shape[0] * shape[1]


def test_bad_structures_are_refused_by_name():
    with pytest.raises(ValueError, match="grid"):
        BlockLowRankLinear(4, 4, grid=(5, 1))
    with pytest.raises(ValueError, match="patterns"):
        ButterflyLinear(16, 16, patterns=[(1, 2, 2, 2), (2, 2, 2, 1)])
    with pytest.raises(ValueError, match="density"):
        SparseProductLinear(4, 4, density=0.01)
    with pytest.raises(ValueError, match="inference"):
        FactorizedLinear(LowRankLinear(4, 4, rank=1).to_product(), inference="fast")


def test_values_that_cannot_be_written_to_are_copied(recwarn):
    W = np.random.default_rng(0).standard_normal((6, 8))
    product = FactorProduct([DenseFactor(W)])
    W.flags.writeable = False
    layer = FactorizedLinear(product, copy=False)
    with torch.no_grad():
        next(layer.parameters()).add_(1)
    np.testing.assert_array_equal(product.toarray(), W)
    np.testing.assert_allclose(layer.weight.detach(), W + 1)
    assert not [each for each in recwarn if "not writable" in str(each.message)]


def test_inference_is_checked_whenever_it_is_set():
    layer = LowRankLinear(8, 8, rank=1)
    layer.inference = "dense"
    conv = FactorizedConv.from_scratch(torch.nn.Conv2d(2, 4, 3), LowRankLinear, rank=1)
    for module in (layer, conv):
        with pytest.raises(ValueError, match="must be 'auto', 'dense' or 'factors', got 'bad'"):
            module.inference = "bad"
    assert layer.inference == "dense"


def test_inputs_that_are_no_tensors_are_refused_by_name():
    layer = LowRankLinear(8, 8, rank=1)
    conv = FactorizedConv.from_scratch(torch.nn.Conv1d(2, 4, 3), LowRankLinear, rank=1)
    for module in (layer, conv):
        with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got ndarray"):
            module(np.ones((3, 8), np.float32))
