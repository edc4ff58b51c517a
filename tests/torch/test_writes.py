"""Eval passes use the current values, however these were written."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import matfact.kernels.fused  # noqa: E402, F401 (without it, the first products keep nothing)
from matfact.torch import (  # noqa: E402
    BlockLowRankLinear,
    ButterflyLinear,
    FactorizedConv,
    KaleidoscopeLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
    keep_unchecked,
)
from matfact.torch.layers._derived import Derived  # noqa: E402


def convolution(structure, seed):
    conv = nn.Conv2d(4, 6, 3, groups=2)
    return FactorizedConv.from_scratch(conv, structure, random_state=seed)


LAYERS = {
    "sparse": lambda seed=0: SparseProductLinear(12, 18, random_state=seed),
    "butterfly": lambda seed=0: ButterflyLinear(16, 16, random_state=seed),
    "kaleidoscope": lambda seed=0: KaleidoscopeLinear(12, 18, random_state=seed),
    "padded": lambda seed=0: MonarchLinear(13, 19, n_blocks=3, random_state=seed),
    "blocks": lambda seed=0: BlockLowRankLinear(12, 19, grid=(2, 3), rank=2, random_state=seed),
    "lowrank": lambda seed=0: LowRankLinear(12, 18, rank=3, random_state=seed),
    "large": lambda seed=0: SparseProductLinear(200, 150, density=0.1, random_state=seed),
    "sparse convolution": lambda seed=0: convolution(SparseProductLinear, seed),
    "Monarch convolution": lambda seed=0: convolution(MonarchLinear, seed),
}


def to_numpy(p):
    array = p.detach().numpy()
    array[...] = array * 2


def to_dlpack(p):
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(p.detach())).mul_(2)


def replace(p):
    p.data = p.data * 2


def point_elsewhere(p):
    p.set_(p.detach() * 2)


def swap(p):
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2))


def in_inference_mode(p):
    with torch.inference_mode():
        p.copy_(p * 2)


WRITES = {
    "in place": lambda p: p.mul_(2),
    "data": lambda p: p.data.mul_(2),
    "detached": lambda p: p.detach().mul_(2),
    "NumPy": to_numpy,
    "DLPack": to_dlpack,
    "replaced data": replace,
    "set": point_elsewhere,
    "swapped": swap,
    "inference mode": in_inference_mode,
    "storage": lambda p: p.untyped_storage().copy_((p * 2).untyped_storage()),
    "one entry": lambda p: p.data.reshape(-1)[-1:].add_(3),
}


def whole(layer):
    """Apply a layer to fixed inputs."""
    shape = (3, 4, 6, 6) if isinstance(layer, FactorizedConv) else (3, layer.in_features)
    return layer(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def agrees(layer):
    """Whether the output in eval mode is that in training mode; leave the layer in eval mode."""
    fresh, kept = whole(layer.train()), whole(layer.eval())
    return bool(torch.linalg.norm(kept - fresh) < 1e-5 * torch.linalg.norm(fresh))


@pytest.mark.parametrize("inference", ["auto", "dense", "factors"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_write_is_noticed(name, write, inference):
    layer = LAYERS[name]().eval()
    layer.inference = inference
    before = [whole(layer) for _ in range(3)][-1]  # small products are prepared at the second call
    for parameter in layer.parameters():
        if parameter.numel():
            WRITES[write](parameter)
    assert agrees(layer)
    assert not torch.equal(whole(layer), before)


@pytest.mark.parametrize("fast", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("name", LAYERS)
def test_optimizers_and_moving_averages_are_noticed(name, fast):
    layer = LAYERS[name]()
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.numel()], lr=0.1, **fast)
    for _ in range(2):
        for network in (layer, average.module):
            with torch.no_grad():
                assert agrees(network)
        whole(layer.train()).square().sum().backward()
        optimizer.step()
        average.update_parameters(layer)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["sparse", "large", "sparse convolution"])
@torch.no_grad()
def test_another_support_with_the_same_values_is_noticed(name, assign):
    layer = LAYERS[name]().eval()
    for parameter in layer.parameters():
        parameter.fill_(1.0)
    before = [whole(layer) for _ in range(2)][-1]
    other = LAYERS[name](seed=1).state_dict()
    state = {
        key: other[key] if key.endswith("mask") else t for key, t in layer.state_dict().items()
    }
    layer.load_state_dict(state, assign=assign)
    assert agrees(layer)
    assert not torch.equal(whole(layer), before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
@torch.no_grad()
def test_bits_are_compared_whatever_they_mean(dtype):
    dtype = getattr(torch, dtype)
    parameter = nn.Parameter(torch.full((3, 4), torch.nan, dtype=dtype).T)
    kept = Derived()
    assert kept.get([parameter], lambda _: "first") == "first"
    assert kept.get([parameter], lambda _: "second") == "first"  # NaN is itself
    parameter.data.fill_(0.0)
    assert kept.get([parameter], lambda _: "third") == "third"
    parameter.data.mul_(-1)
    assert kept.get([parameter], lambda _: "fourth") == "fourth"
    parameter.data = parameter.data.reshape(12)
    assert kept.get([parameter], lambda _: "fifth") == "fifth"
    parameter.data = parameter.data.view(torch.uint8).view(dtype).contiguous()
    assert kept.get([parameter], lambda _: "sixth") == "fifth"


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_values_that_code_has_put_in_place_are_used(name):
    """Of one factor alone, as torch's own pruning does."""
    layer = LAYERS[name]().eval()
    whole(layer)
    factor = next(m for m in layer.modules() if "values" in m._parameters and m.values.numel())
    prune.random_unstructured(factor, "values", amount=0.5)
    assert agrees(layer)
    factor.values_orig.mul_(0.1)
    assert agrees(layer)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_unchecked_layers_notice_what_torch_counts(name):
    layer = keep_unchecked(LAYERS[name]().eval())
    whole(layer)
    for write in ("in place", "replaced data", "set", "inference mode"):
        for parameter in layer.parameters():
            if parameter.numel():
                WRITES[write](parameter)
        assert agrees(layer)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    assert agrees(other)  # copies are checked


@torch.no_grad()
def test_unchecked_layers_do_not_look_at_values():
    layer = keep_unchecked(LAYERS["large"]().eval())
    before = whole(layer)
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    assert torch.equal(whole(layer), before)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_memory_that_moves_between_processes_is_followed(name):
    layer = LAYERS[name]().eval()
    before = whole(layer)
    layer.share_memory()
    torch.testing.assert_close(whole(layer), before)
    twin = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(whole(twin), before)
