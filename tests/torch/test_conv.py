"""Factorized convolutions against the dense convolution with the same kernel."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

from matfact import LowRank  # noqa: E402
from matfact.operators import FactorProduct  # noqa: E402
from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    FactorizedConv,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    compress,
)

CONVOLUTIONS = {
    "padded": nn.Conv2d(8, 12, 3, padding=1),
    "groups": nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2), groups=2, padding_mode="reflect"),
    "dilated": nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2, bias=False),
    "valid 1-D": nn.Conv1d(8, 12, 5, padding="valid", stride=2),
    "circular 1-D": nn.Conv1d(8, 12, 4, padding="same", padding_mode="circular"),
    "3-D": nn.Conv3d(8, 12, (3, 2, 3), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)),
    "replicate 3-D": nn.Conv3d(8, 12, 2, groups=2, padding=1, padding_mode="replicate"),
}
STRUCTURES = [
    (SparseProductLinear, {}),
    (LowRankLinear, {"rank": 3}),
    (MonarchLinear, {}),
    (BlockLowRankLinear, {}),
]


def images(conv, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    size = (7, 9, 6)[: len(conv.kernel_size)]
    return torch.randn(2, 8, *size, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_output_is_that_of_the_dense_kernel(name, structure, parameters):
    conv = CONVOLUTIONS[name]
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters)
    x = images(conv)
    dense = layer.to_dense()
    assert type(dense) is type(conv)
    for batch in (x, x[0]):
        torch.testing.assert_close(layer(batch), dense(batch), rtol=1e-4, atol=1e-5)
    layer.eval()
    with torch.no_grad():
        for layer.inference in ("auto", "dense", "factors"):
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dense", "factors"])
def test_patches_are_multiplied_by_the_dense_matrix_in_torch(method, monkeypatch):
    conv = FactorizedConv.from_scratch(nn.Conv2d(4, 6, 3), MonarchLinear, random_state=0).eval()
    conv.inference = "factors"  # with no convolution by the dense kernel
    applied = []
    apply = FactorProduct.__matmul__
    monkeypatch.setattr(FactorProduct, "__matmul__", lambda *a: applied.append(1) or apply(*a))
    monkeypatch.setattr(FactorProduct, "method_for", lambda *_: method)
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(conv(x), conv.to_dense()(x))
    assert bool(applied) == (method == "factors")


def test_gradients_reach_all_values():
    layer = FactorizedConv.from_scratch(CONVOLUTIONS["groups"], SparseProductLinear)
    layer(torch.randn(2, 8, 9, 9)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES)
@pytest.mark.parametrize("name", ["groups", "valid 1-D"])
def test_gradients_are_those_of_finite_differences(name, structure, parameters):
    conv = copy.deepcopy(CONVOLUTIONS[name]).double()
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters)
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = (images(conv, torch.float64)[:1].requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(output, arguments, fast_mode=True)


@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES)
def test_copies_halves_and_exports_compute_the_same(structure, parameters):
    conv = CONVOLUTIONS["groups"]
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters).eval()
    x = images(conv)
    with torch.no_grad():
        expected = layer(x)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        other = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters)
        other.load_state_dict(layer.state_dict())
        for twin in (*twins, other.eval()):
            torch.testing.assert_close(twin(x), expected)
        half = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
        error = torch.linalg.norm(half.float() - expected) / torch.linalg.norm(expected)
        assert error < 16 * torch.finfo(torch.bfloat16).eps
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES[1:3])
def test_onnx_export_computes_the_same_convolution(structure, parameters):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    conv = CONVOLUTIONS["groups"]
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters).eval()
    layer.inference, x = "factors", images(conv)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_of_volumes_is_compressed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 8, 2))
    small, report = compress(model, LowRank(rank=4), calibration=[torch.randn(2, 2, 6, 6, 6)])
    assert [row.method for row in report] == ["LowRank"] * 2
    assert small(torch.randn(1, 2, 6, 6, 6)).shape == (1, 8, 3, 3, 3)


def test_kernels_of_another_shape_are_refused():
    conv = CONVOLUTIONS["padded"]
    with pytest.raises(ValueError, match="kernels"):
        FactorizedConv(conv, [LowRankLinear(8, 12, rank=1, bias=False)])


def test_transposed_convolutions_are_refused():
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        FactorizedConv.from_scratch(nn.ConvTranspose2d(8, 12, 3), LowRankLinear, rank=1)
