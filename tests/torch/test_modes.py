"""Training and eval mode compute the same under all that torch wraps around modules."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call, stack_module_state, vmap  # noqa: E402

from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    FactorizedConv,
    KaleidoscopeLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    add_adapters,
    compress,
    fine_tune,
    load_network,
    merge_adapters,
    prune_network,
    prune_neurons,
    save_network,
    tensor_train,
    tucker_svd,
)

STRUCTURES = {
    "sparse": (SparseProductLinear, {}),
    "kaleidoscope": (KaleidoscopeLinear, {}),
    "monarch": (MonarchLinear, {}),
    "blocks": (BlockLowRankLinear, {"grid": (2, 3)}),
    "lowrank": (LowRankLinear, {"rank": 3}),
}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return STRUCTURES[request.param]


@pytest.fixture(params=["linear", "convolution"])
def layer(request, structure):
    build, parameters = structure
    if request.param == "linear":
        made = build(13, 18, random_state=0, **parameters)
    else:
        conv = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        made = FactorizedConv.from_scratch(conv, build, random_state=0, **parameters)
    with torch.no_grad():
        made.bias.normal_()
    return made


def inputs(layer):
    shape = (2, 8, 6, 6) if isinstance(layer, FactorizedConv) else (5, layer.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inference", ["auto", "dense", "factors"])
@torch.no_grad()
def test_autocast_gives_the_dtype_and_nearly_the_values_of_the_dense_layer(layer, inference):
    layer.inference = inference
    x, dense = inputs(layer), layer.to_dense()
    expected = dense(x)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer.train(training)(x)
            assert output.dtype == dense(x).dtype == torch.bfloat16
        assert torch.linalg.norm(output - expected) < 0.03 * torch.linalg.norm(expected)


def test_autocast_trains(layer):
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs(layer))
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.numel())


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_stacked_networks_compute_what_each_does(layer, training):
    x, networks = inputs(layer), [layer.train(training), copy.deepcopy(layer)]
    for parameter in networks[1].parameters():
        parameter.mul_(2)
    expected = torch.stack([network(x) for network in networks])
    parameters, buffers = stack_module_state(networks)
    mapped = vmap(lambda *state: functional_call(layer, state, (x,)))(parameters, buffers)
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # what is constant in a trace
@torch.no_grad()
def test_traced_layers_follow_writes(layer):
    x = inputs(layer)
    layer.eval()(x)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.compiler.reset()  # there is a limit for all layers compiled so far
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        expected = layer.train()(x)
        layer.eval()
        for version in (traced, compiled, layer):
            torch.testing.assert_close(version(x), expected, rtol=1e-4, atol=1e-4)
        for parameter in layer.parameters():
            parameter.data.mul_(2)


@torch.no_grad()
def test_dtypes_can_be_changed_back_and_forth(layer):
    x = inputs(layer)
    expected = layer.eval()(x)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        changed = layer.to(dtype)
        assert changed(x.to(dtype)).dtype == dtype
        fresh = changed.train()(x.to(dtype))
        torch.testing.assert_close(changed.eval()(x.to(dtype)), fresh, rtol=0.05, atol=0.1)
    output = layer.float()(x)
    assert torch.linalg.norm(output - expected) < 0.05 * torch.linalg.norm(expected)


@torch.inference_mode()
def test_parameters_made_in_inference_mode_count(layer):
    layer, x = copy.deepcopy(layer).eval(), inputs(layer)
    for _ in range(2):
        torch.testing.assert_close(layer(x), layer.train()(x), rtol=1e-4, atol=1e-4)
        layer.eval()
        for parameter in layer.parameters():
            parameter.mul_(2)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["dsf", "magnitude", "monarch", "lowrank", "blocksvd"])
def test_used_networks_are_pickled_with_and_without_adapters(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.ReLU(), nn.Linear(80, 24)).eval()
    x = torch.randn(3, 4, 12)
    small, _ = compress(model, method, density=0.5)
    for adapters in (0, 2):
        if adapters:
            for parameter in add_adapters(small, adapters, random_state=0):
                nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            expected = small.eval()(x)
        small.train()(x).square().sum().backward()
        for twin in (saved(small), copy.deepcopy(small), saved(saved(small))):
            torch.testing.assert_close(twin.eval()(x), expected)
            torch.testing.assert_close(twin.train()(x), expected)
    torch.testing.assert_close(merge_adapters(saved(small))(x), expected)


def test_a_state_with_adapters_brings_its_support_along():
    torch.manual_seed(0)
    layers = [SparseProductLinear(12, 18, random_state=seed) for seed in (0, 1)]
    for layer in layers:
        for parameter in add_adapters(layer, 2, random_state=0):
            nn.init.normal_(parameter, std=0.1)
    source, target = layers
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(target(x), source(x))
    torch.testing.assert_close(merge_adapters(target)(x), source(x))


def test_a_network_without_layers_to_adapt_stays_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="compressed layers to adapt"):
        add_adapters(model, 2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_pickled_with_column_numbers_of_sixteen_bits_compute_the_same():
    layer, x = SparseProductLinear(12, 18, random_state=0), torch.randn(3, 12)
    old = copy.deepcopy(layer)
    for factor in old.factors:
        factor._buffers["indices"] = factor.indices.view(torch.int16)[:, 0]
    torch.testing.assert_close(saved(old)(x), layer(x))
    assert saved(old).factors[0].indices.dtype == torch.uint8


def network():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))


BATCHES = [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(2)]
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))


def loaded(model, folder):
    save_network(compress(model, "magnitude", density=0.5).model, folder / "network")
    return load_network(network(), folder / "network")


def adapted(model, _):
    small = compress(model, "magnitude", density=0.5).model
    add_adapters(small, rank=2, random_state=0)
    return small


#: Functions that change or make a network, given one and a folder.
ENTRIES = {
    "compress": lambda model, _: compress(model, "magnitude", density=0.5).model,
    "with calibration": lambda model, _: compress(
        model, "wanda", density=0.5, calibration=[x for x, _ in BATCHES]
    ).model,
    "compress in place": lambda model, _: compress(model, "magnitude", inplace=True).model,
    "prune": lambda model, _: prune_network(model, "magnitude", keep=0.5) and model,
    "prune neurons": lambda model, _: prune_neurons(model, [x for x, _ in BATCHES]).model,
    "fine-tune": lambda model, _: fine_tune(
        model, BATCHES, lambda y, batch: nn.functional.mse_loss(y, batch[1]), epochs=1
    ) and model,
    "decompose": lambda *_: tucker_svd(CONVOLUTIONS, ranks=0.5),
    "parametrize": lambda *_: tensor_train(CONVOLUTIONS, max_rank=2),
    "adapt": adapted,
    "load": loaded,
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_made_in_inference_mode_can_be_trained(entry, tmp_path):
    dense = network()
    with torch.inference_mode():
        model = ENTRIES[entry](dense, tmp_path)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    x = torch.randn(2, 3, 9, 9) if entry in {"decompose", "parametrize"} else BATCHES[0][0]
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("entry", ["compress in place", "prune", "fine-tune"])
def test_networks_made_in_inference_mode_are_not_changed_in_place(entry, tmp_path):
    with torch.inference_mode():
        model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'0.weight' was created inside.*copy\.deepcopy"):
        ENTRIES[entry](model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    ENTRIES[entry](copy.deepcopy(model), tmp_path)
