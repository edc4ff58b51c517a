"""Which road factors take on a GPU, and the operators that they take it by, without a GPU."""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from matfact.operators import (  # noqa: E402
    Advice,
    DenseFactor,
    FactorProduct,
    KroneckerSparseFactor,
    QuantizedFactor,
    SignFactor,
    SparseFactor,
)
from matfact.operators._quantized import first_groups, group_bounds  # noqa: E402
from matfact.torch import (  # noqa: E402
    FactorizedLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    keep_unchecked,
)
from matfact.torch.kernels import operators, roads  # noqa: E402
from matfact.torch.layers import _gpu, _semi_structured  # noqa: E402
from matfact.torch.layers._chain import factor_module  # noqa: E402

HOPPER = (9, 0)


def sparse(rows=5, columns=16, density=0.5):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < density)
    W[2] = 0
    return SparseFactor.from_dense(torch.from_numpy(W))


def two_four(rows=32, columns=64):
    """Return a factor with two values in each four of a row."""
    rng = np.random.default_rng(0)
    order = rng.random((rows, columns // 4, 4)).argsort(axis=2)
    W = np.where(order < 2, 1 + rng.random(order.shape), 0).reshape(rows, columns)
    return SparseFactor.from_dense(torch.from_numpy(W.astype(np.float32)))


def large_layer(n=4096, n_values=1 << 18):
    rng, factors = np.random.default_rng(0), []
    for _ in range(2):
        places = np.unique(rng.integers(0, n * n, n_values))
        values = np.ones(len(places), np.float32)
        factors.append(SparseFactor.from_locations(values, places, (n, n)))
    return FactorizedLinear(FactorProduct(factors)).half()


def quantized(pattern, group_size):
    rng = np.random.default_rng(1)
    levels = torch.from_numpy(rng.integers(-3, 4, tuple(pattern.values.shape)).astype(np.int8))
    n_groups = len(group_bounds(pattern, group_size)) - 1
    scales = torch.from_numpy(rng.random(n_groups) + 0.5)
    return QuantizedFactor(levels, scales, 3, group_size, pattern)


FACTORS = {
    "sparse": sparse(),
    "codes": quantized(DenseFactor(torch.zeros(5, 16, dtype=torch.float64)), None),
    "grouped codes": quantized(DenseFactor(torch.zeros(5, 16, dtype=torch.float64)), 3),
    "sparse codes": quantized(sparse(), None),
    "grouped sparse codes": quantized(sparse(), 3),
    "signs": SignFactor.from_dense(sparse().toarray()),
    "Kronecker": KroneckerSparseFactor(torch.randn(2, 2, 3, 4, dtype=torch.float64)),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Let factors take the operators for tensors on the host, whatever their size."""
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    monkeypatch.setattr(_gpu, "takes_kernels", lambda *tensors: True)
    monkeypatch.setattr(_gpu, "target_of", lambda x: _gpu.Target(torch.float32, HOPPER))
    monkeypatch.setattr(roads, "quickest", lambda times: "tiles")


@pytest.mark.parametrize("kind", FACTORS)
def test_operators_compute_what_torch_does(kind, on_gpu):
    module = factor_module(FACTORS[kind]).float()
    x = torch.randn(2, 3, module.columns)
    with torch.no_grad(), Record() as record:
        got = module(x) if kind == "Kronecker" else module._on_gpu(x)
    expected = x @ FACTORS[kind].toarray().float().T
    torch.testing.assert_close(got, expected)
    assert any(name.startswith("matfact.") for name in record.names)


@pytest.mark.parametrize("kind", FACTORS)
def test_operators_are_sound_and_have_gradients(kind):
    module = factor_module(FACTORS[kind])
    x = torch.randn(3, module.columns, dtype=torch.float64, requires_grad=True)
    operator, arguments = call_of(module, x)
    torch.library.opcheck(operator, arguments)
    assert torch.autograd.gradcheck(operator, arguments)
    assert torch.autograd.gradgradcheck(operator, arguments)


def call_of(module, x):
    held = dict(module.named_buffers())
    positions = [held.get(name) for name in ("mask", "indices", "indptr")]
    if "signs" in held:
        return operators.sign_linear, (x, module.signs, module.rows)
    if "codes" in held:
        is_grouped = module.group_size is not None
        coded = module.codes, module.scales, module.groups, module.unit, is_grouped
        return operators.coded_linear, (x, *coded, *positions)
    if "mask" in held:
        return operators.sparse_linear, (x, module.values, *positions)
    return operators.kronecker_linear, (x, module.values)


def test_gradients_of_blocks_are_sound():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(operators.kronecker_gradient, (x, grad, [2, 2, 3, 4]))


def test_compressed_rows_of_torch():
    module = factor_module(sparse())
    x = torch.randn(3, 16, dtype=torch.float64)
    got = operators.by_cusparse(x, module.values.detach(), module.indices, module.indptr)
    torch.testing.assert_close(got, x @ module.dense().detach().T)


@pytest.mark.parametrize("group_size", [None, 1, 3, 100])
@pytest.mark.parametrize("pattern", [sparse(), DenseFactor(torch.zeros(5, 16))])
def test_first_groups_of_rows(pattern, group_size):
    bounds, groups = group_bounds(pattern, group_size), first_groups(pattern, group_size)
    starts = getattr(pattern, "indptr", 16 * np.arange(6))
    np.testing.assert_array_equal(bounds[groups], starts)


# The rule.


@pytest.mark.parametrize("samples", [1, 16, 256, 4096])
@pytest.mark.parametrize("density", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("n", [256, 4096])
def test_no_factor_takes_longer_than_densifying(samples, density, n):
    storage = roads.Storage("sparse", n, n, int(density * n * n), 2)
    times = roads.times(storage, samples, 2)
    assert times[roads.quickest(times)] <= times["torch"]


def test_layers_take_factors_only_where_they_are_faster_than_the_dense_product(monkeypatch):
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    layer = large_layer()
    one, many = layer.gpu_roads(1, in_graph=True), layer.gpu_roads(256, in_graph=True)
    assert one.method == "factors"
    assert one.factors_seconds < one.dense_seconds
    assert many.method == "dense"
    assert many.factors_seconds > many.dense_seconds


def test_comparing_copies_counts_for_the_dense_product(monkeypatch):
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    layer = MonarchLinear(1024, 1024)
    checked, unchecked = layer.gpu_roads(1), keep_unchecked(layer).gpu_roads(1)
    assert checked.factors_seconds == unchecked.factors_seconds
    assert checked.dense_seconds > unchecked.dense_seconds
    assert unchecked.method == "dense"  # the host starts one kernel in place of two


@pytest.mark.parametrize("samples", [1, 16, 256, 4096])
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: MonarchLinear(256, 256),
        lambda: LowRankLinear(4096, 4096, rank=64),
        lambda: SparseProductLinear(512, 512, density=0.25),
    ],
)
def test_no_layer_takes_longer_than_its_dense_product(make, in_graph, samples):
    roads = make().gpu_roads(samples, in_graph=in_graph)
    fastest = min(roads.factors_seconds, roads.dense_seconds)
    assert {"factors": roads.factors_seconds, "dense": roads.dense_seconds}[roads.method] == fastest


def test_the_time_of_the_host_counts_outside_of_graphs(monkeypatch):
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    assert keep_unchecked(large_layer()).gpu_roads(1).method == "dense"


def test_without_triton_nothing_changes(monkeypatch):
    monkeypatch.setattr(operators, "HAS_TRITON", False)
    layer = SparseProductLinear(1024, 1024, density=0.01, random_state=0, dtype=torch.float16)
    assert layer.gpu_roads(1).factors == ("torch", "torch")
    assert keep_unchecked(layer).gpu_roads(1).method == "dense"
    assert LowRankLinear(64, 64, rank=2).gpu_roads(1).method == "factors"
    assert MonarchLinear(4096, 4096).gpu_roads(1).method == "factors"


def test_tuning_replaces_the_rule_for_a_number_of_samples(monkeypatch):
    layer = MonarchLinear(4096, 4096, random_state=0, dtype=torch.float16)
    monkeypatch.setattr(_gpu, "is_untransformed", lambda x: True)
    monkeypatch.setattr(roads, "HOST", dict.fromkeys(roads.HOST, 0.0))
    monkeypatch.setattr(
        _gpu, "measure", lambda factors, dense, X: (factors(X), dense(X)) and Advice(1, 2.0, 1.0)
    )
    with fake_gpu(layer, monkeypatch), torch.no_grad():
        x = torch.empty(1, 4096, device="cuda", dtype=torch.float16)
        product = torch.empty(4096, 4096, device="cuda", dtype=torch.float16)
        monkeypatch.setattr(layer._product, "get", lambda *state: product)
        advice = layer.train().tune(1)
        assert (layer.training, layer.inference) == (True, "auto")
        assert (advice.rule, advice.method, advice.changed) == ("factors", "dense", True)
        assert layer.eval()._method_for(x, layer.values()) == "dense"
        assert layer._method_for(x.expand(2, -1), layer.values()) == "factors"


def test_layers_on_the_cpu_are_not_tuned():
    with pytest.raises(TypeError, match="needs a layer on a GPU, this one is on cpu"):
        LowRankLinear(8, 8, rank=1).tune(1)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        LowRankLinear(8, 8, rank=1).tune(0)


def test_roads_of_what_no_kernel_takes_are_refused():
    with pytest.raises(ValueError, match=r"dtype float32, float16, bfloat16, got torch\.float64"):
        LowRankLinear(8, 8, rank=1, dtype=torch.float64).gpu_roads(1)


@pytest.mark.parametrize(
    "batch_size", [0, -1, True, 2.5, 1.0, float("nan"), float("inf"), "3", None]
)
def test_batch_sizes_that_are_no_numbers_of_samples_are_refused(batch_size):
    message = rf"batch_size must be an integer of at least 1, got {batch_size!r}\."
    with pytest.raises(ValueError, match=message):
        LowRankLinear(8, 8, rank=1).gpu_roads(batch_size)


@pytest.mark.parametrize("capability", [9, 9.0, "9.0", "90", (9,), (9, 0, 0), (9.5, 0), (None, 0)])
def test_capabilities_that_are_not_two_integers_are_refused(capability):
    with pytest.raises(ValueError, match=r"capability must be two integers such as .*, got"):
        LowRankLinear(8, 8, rank=1).gpu_roads(1, capability=capability)


def test_predictions_hold_plain_numbers():
    roads = LowRankLinear(8, 8, rank=1).gpu_roads(np.int64(3))
    assert list(map(type, roads)) == [int, tuple, float, float, str]


def test_operators_choose_roads_and_compile_nothing_while_a_graph_is_captured(monkeypatch):
    captures = False
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    monkeypatch.setattr(operators, "_RUN", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    monkeypatch.setattr(operators, "_capability", lambda x: HOPPER)
    times = {"torch": 2.0, "tiles": 1.0}

    def chosen(n, factor="signs"):
        return operators._fastest(torch.zeros(n, 2), times, factor)

    captures = True
    assert chosen(1) == "torch"
    captures = False
    assert chosen(1) == "tiles"
    captures = True
    assert (chosen(1), chosen(2), chosen(1, "others")) == ("tiles", "torch", "torch")
    captures = False
    monkeypatch.setattr(operators, "_capability", lambda x: (7, 5))
    assert chosen(1) == "torch"


# Layers on a device that does not exist: what they would call there.


class Record(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_gpu(layer, monkeypatch):
    """Move a layer to a GPU that only knows shapes."""
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    monkeypatch.setattr(_gpu, "target_of", lambda x: _gpu.Target(x.dtype, HOPPER))
    layer.eval().requires_grad_(False).gpu_roads(1)  # which reads the positions
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in layer.modules():
            for name, tensor in module._parameters.items():
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            for name, tensor in module._buffers.items():
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        yield mode


def called(layer, n, monkeypatch):
    monkeypatch.setattr(_gpu, "is_untransformed", lambda x: True)  # as if x were no subclass
    with fake_gpu(layer, monkeypatch), torch.no_grad(), Record() as record:
        out = layer.eval()(torch.empty(n, layer.in_features, device="cuda", dtype=torch.float16))
    assert out.shape == (n, layer.out_features)
    return [name for name in record.names if name.startswith("matfact.")]


def test_sparse_layers_call_kernels_on_cuda(monkeypatch):
    monkeypatch.setattr(roads, "HOST", dict.fromkeys(roads.HOST, 0.0))
    assert called(large_layer(), 1, monkeypatch) == ["matfact.sparse_linear.default"] * 2


def test_monarch_layers_call_kernels_on_cuda(monkeypatch):
    layer = MonarchLinear(4096, 4096, random_state=0, dtype=torch.float16)
    assert "matfact.kronecker_linear.default" in called(layer, 1, monkeypatch)


def test_what_kernels_take(monkeypatch):
    monkeypatch.setattr(_gpu, "is_untransformed", lambda x: True)
    with FakeTensorMode():
        half, double, single = (
            torch.empty(2, 2, device="cuda", dtype=dtype)
            for dtype in (torch.float16, torch.float64, torch.float32)
        )
        assert _gpu.takes_kernels(half, half)
        assert not _gpu.takes_kernels(half, single)
        assert not _gpu.takes_kernels(double, double)
        assert not _gpu.takes_kernels(torch.empty(0, 2, device="cuda", dtype=torch.float16))
        assert not _gpu.takes_kernels(torch.empty(2, 2))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert not _gpu.takes_kernels(half, half)


@pytest.mark.parametrize("make", [SparseProductLinear, MonarchLinear])
def test_exported_layers_call_kernels_for_any_number_of_samples(make, monkeypatch):
    layer = make(1024, 1024, random_state=0, dtype=torch.float16).eval()
    with fake_gpu(layer, monkeypatch):
        x = torch.empty(4, 1024, device="cuda", dtype=torch.float16)
    sizes = {"input": {0: torch.export.Dim("n", min=2, max=4096)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=False)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum(name.startswith("matfact.") for name in names) == 2


# 2:4 values.


def test_two_four_values_are_found():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((3, 12)) < 0.35
        expected = (mask.reshape(-1, 4).sum(1) <= 2).all()
        assert _semi_structured.is_two_four(np.packbits(mask), mask.shape) == expected
    assert not _semi_structured.is_two_four(np.packbits(np.zeros((2, 6), bool)), (2, 6))


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "capability", "reason"),
    [
        (32, 64, "float16", (8, 0), None),
        (32, 64, "bfloat16", (9, 0), None),
        (32, 64, "float32", (9, 0), "neither float16 nor bfloat16"),
        (32, 48, "float16", (9, 0), "not multiples of 32×64"),
        (16, 64, "float16", (9, 0), "not multiples of 32×64"),
        (32, 64, "float16", (7, 5), "compute capability 7.5"),
        (32, 64, "float16", (10, 0), "compute capability 10.0"),
    ],
)
def test_where_two_four_values_are_multiplied(rows, columns, dtype, capability, reason):
    refusal = roads.refuses_semi_structured(rows, columns, dtype, capability)
    assert (refusal is None) if reason is None else (reason in refusal)


def test_large_two_four_layers_take_the_products_of_torch(monkeypatch):
    monkeypatch.setattr(operators, "HAS_TRITON", False)
    factor = SparseFactor.from_dense(np.tile(np.float32([1, 2, 0, 0]), (2048, 1024)))
    layer = FactorizedLinear(FactorProduct([factor])).half().eval()
    assert layer.gpu_roads(4096, capability=HOPPER).factors == ("semi-structured",)
    assert layer.gpu_roads(4096, capability=HOPPER).method == "factors"
    assert layer.gpu_roads(4096, capability=(7, 5)).factors == ("torch",)
    assert layer.float().gpu_roads(4096, capability=HOPPER).factors == ("torch",)
    assert layer.half().train().gpu_roads(4096, capability=HOPPER).factors == ("torch",)


def test_two_four_values_are_compressed_once_and_again_when_they_change(monkeypatch):
    module = factor_module(two_four()).eval()
    compressions = []
    monkeypatch.setattr(
        _semi_structured, "to_sparse_semi_structured", lambda W: compressions.append(W) or W
    )
    x, semi = torch.randn(3, 64), module.semi_structured
    with torch.no_grad():
        assert "2:4" not in repr(module)
        first = semi.apply(module, x)
        torch.testing.assert_close(semi.apply(module, x), first)
        assert len(compressions) == 1
        assert "applied as 2:4 values" in repr(module)
        module.values.data.mul_(2)
        torch.testing.assert_close(semi.apply(module, x), 2 * first)
    assert semi.apply(module, x) is None  # a gradient of the values is needed


def test_values_that_torch_cannot_compress_are_left_dense(monkeypatch):
    def refuse(matrix):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(_semi_structured, "to_sparse_semi_structured", refuse)
    module, target = factor_module(two_four()).eval(), _gpu.Target(torch.float16, HOPPER)
    assert module.semi_structured.suits(module, target)
    with torch.no_grad():
        assert module.semi_structured.apply(module, torch.randn(3, 64)) is None
    assert not module.semi_structured.suits(module, target)
    assert "not applied as 2:4 values: no kernel for this device" in repr(module)


def test_another_support_is_looked_at_again():
    module, target = factor_module(two_four()).half().eval(), _gpu.Target(torch.float16, HOPPER)
    other = factor_module(SparseFactor.from_dense(torch.ones(32, 64)))
    assert module.semi_structured.suits(module, target)
    module.load_state_dict(other.state_dict())
    assert not module.semi_structured.suits(module, target)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("width", [1, 63, 65])
@pytest.mark.parametrize("make", [SparseProductLinear, MonarchLinear])
def test_inputs_of_another_width_are_refused(make, width, is_training):
    layer = make(64, 64).train(is_training)
    with pytest.raises(
        ValueError, match=rf"64 features in its last axis, got shape \(3, {width}\)"
    ):
        layer(torch.ones(3, width))
