"""Factorized convolutions against the dense convolution with the same kernel."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    ButterflyLinear,
    FactorizedConv,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
)

CONVOLUTIONS = {
    "padded": nn.Conv2d(8, 12, 3, padding=1),
    "groups": nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2), groups=2, padding_mode="reflect"),
    "dilated": nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2, bias=False),
    "valid 1-D": nn.Conv1d(8, 12, 5, padding="valid", stride=2),
    "circular 1-D": nn.Conv1d(8, 12, 4, padding="same", padding_mode="circular"),
}
STRUCTURES = [
    (SparseProductLinear, {}),
    (LowRankLinear, {"rank": 3}),
    (MonarchLinear, {}),
    (ButterflyLinear, {}),
    (BlockLowRankLinear, {}),
]


@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_output_is_that_of_the_dense_kernel(name, structure, parameters):
    conv = CONVOLUTIONS[name]
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters)
    x = torch.randn(2, 8, *(11, 13)[: len(conv.kernel_size)])
    dense = layer.to_dense()
    assert type(dense) is type(conv)
    for batch in (x, x[0]):
        torch.testing.assert_close(layer(batch), dense(batch), rtol=1e-4, atol=1e-5)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_values():
    layer = FactorizedConv.from_scratch(CONVOLUTIONS["groups"], SparseProductLinear)
    layer(torch.randn(2, 8, 9, 9)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize(("structure", "parameters"), STRUCTURES)
def test_few_and_many_positions_have_the_same_gradients(structure, parameters):
    conv = nn.Conv2d(16, 12, 3, padding=1)
    layer = FactorizedConv.from_scratch(conv, structure, random_state=0, **parameters).double()
    x = torch.randn(40, 16, 6, 6, dtype=torch.float64)
    many = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    layer.eval().inference = "factors"  # never through the dense kernel
    few = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(many, few, strict=True):
        torch.testing.assert_close(a, b)


def test_a_butterfly_of_many_positions_is_one_dense_convolution():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layer = FactorizedConv.from_scratch(conv, ButterflyLinear, random_state=0)
    assert layer.keeps_product()  # patches cost more than a kernel of few channels
    wide = FactorizedConv.from_scratch(nn.Conv2d(16, 1024, 1), MonarchLinear, random_state=0)
    assert not wide.keeps_product()


def test_kernels_of_another_shape_are_refused():
    conv = CONVOLUTIONS["padded"]
    with pytest.raises(ValueError, match="kernels"):
        FactorizedConv(conv, [LowRankLinear(8, 12, rank=1, bias=False)])
