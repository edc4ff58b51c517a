"""Units that qualify as a block, in networks of all kinds: nothing else may read them."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from matfact.torch.neurons import NeuronBlock, find_blocks, prune_neurons  # noqa: E402


class Net(nn.Module):
    """A network whose forward pass is a function of it and the input."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def hidden(n_units=30, n_read=None, **more):
    """Return layers that write and read units, in random but equal networks."""
    torch.manual_seed(0)
    return {"a": nn.Linear(8, n_units), "b": nn.Linear(n_read or n_units, 4), **more}


def also(read, **more):
    """Return a network in which `read` sees the units of a block too."""

    def run(net, x):
        h = net.a(x).relu()
        return read(net, h, net.b(h))

    return Net(run, **hidden(**more))


def hooked():
    net = Net(lambda net, x: net.b(net.a(x).relu()) + net.kept[0], **hidden())
    net.kept = [0.0]
    net.a.register_forward_hook(lambda _, x, y: net.kept.__setitem__(0, y[:, 12:16].detach()))
    return net


def tied():
    def run(net, x):
        return net.b(net.a(x).relu()) + net.d(net.c(x).relu())

    net = Net(run, **hidden(c=nn.Linear(8, 30), d=nn.Linear(30, 4)))
    net.c.weight = net.a.weight
    return net


class Centered(nn.Linear):
    """Units of a layer whose forward is not torch's."""

    def forward(self, x):
        return functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


NO_BLOCKS = {
    "a slice": also(lambda net, h, y: y + net.c(h[:, 10:20]), c=nn.Linear(10, 4)),
    "a mean": also(lambda net, h, y: y + h.mean(1, keepdim=True)),
    "the largest": also(lambda net, h, y: y + functional.one_hot(h.argmax(1) % 4, 4)),
    "the caller": also(lambda net, h, y: (y, h[:, 5:9])),
    "a hook": hooked(),
    "a tied layer": tied(),
    "with a constant": Net(lambda net, x: net.b(net.a(x) * net.g), **hidden(), g=torch.ones(30)),
    "a residual stream": Net(lambda net, x: net.b(net.a(x).relu() + x), **hidden(8)),
    "two units and a stream": Net(lambda net, x: net.b(net.a(x) + x[:, :2]), **hidden(2)),
    "beside others": Net(
        lambda net, x: net.b(torch.cat([net.a(x).relu(), x], 1)), **hidden(30, 38)
    ),
    "in another order": Net(
        lambda net, x: net.b(net.a(x)[:, [0, 2, 1, *range(3, 30)]]), **hidden()
    ),
    "shuffled": Net(
        lambda net, x: net.b(net.a(x).unflatten(1, (5, 6)).transpose(1, 2).flatten(1)), **hidden()
    ),
    "sorted": Net(lambda net, x: net.b(net.a(x).sort(1).values), **hidden()),
    "normalized": Net(lambda net, x: net.b(functional.normalize(net.a(x))), **hidden()),
    "by a subclass": Net(
        lambda net, x: net.c(net.a(x).relu()), **hidden(c=Centered(30, 4), b=nn.Identity())
    ),
    "from a subclass": Net(
        lambda net, x: net.b(net.c(x).relu()), **hidden(c=Centered(8, 30), a=nn.Identity())
    ),
}


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_units_that_are_read_elsewhere_or_not_by_place_are_no_block(name):
    assert find_blocks(NO_BLOCKS[name], torch.randn(16, 8)) == []


def again(net, x):
    y = net.b(net.a(x).relu())
    return net.b(net.a(net.c(y)).relu())


BLOCKS = {
    "two layers added": Net(
        lambda net, x: net.b(net.a(x).relu() + net.c(x)), **hidden(c=nn.Linear(8, 30))
    ),
    "called many times": Net(again, **hidden(c=nn.Linear(4, 8))),
    "one normalization": Net(
        lambda net, x: net.b(net.n(net.a(x)).relu()), **hidden(n=nn.BatchNorm1d(30))
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_cut_without_loss_where_no_unit_matters(name):
    net, x = copy.deepcopy(BLOCKS[name]).eval(), torch.randn(200, 8)
    with torch.no_grad():
        net.b.weight[:, ::2] = 0.0
        expected = net(x)
        (block,) = (b for b in find_blocks(net, x[:16]) if b.consumer == "b")
        result = prune_neurons(net, [x], 15, blocks=[block])
        torch.testing.assert_close(result.model(x), expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(result.blocks[0].kept, np.arange(1, 30, 2))


def test_all_calls_of_a_layer_count():
    net = BLOCKS["called many times"]
    x = torch.randn(100, 8)
    (block,) = (b for b in find_blocks(net, x[:16]) if b.consumer == "b")
    seen = []
    handle = net.b.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    expected = net(x)
    handle.remove()
    assert len(seen) == 2
    result = prune_neurons(net, [x], 20, blocks=[block])
    cut = result.model.b
    kept = torch.from_numpy(result.blocks[0].kept)
    with torch.no_grad():
        wanted = torch.cat([net.b(h) for h in seen])
        got = torch.cat([cut(h[:, kept]) for h in seen])
        error = (got - wanted).norm() / (wanted - wanted.mean(0)).norm()
        assert (result.model(x) - expected).norm() < 0.3 * expected.norm()
    assert result.blocks[0].error == pytest.approx(float(error), rel=1e-3)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def mobile(channels=8, units=24):
    """Return an inverted residual block, between a stem and a head."""
    torch.manual_seed(0)
    body = (
        nn.Conv2d(channels, units, 1, bias=False), nn.BatchNorm2d(units), nn.ReLU6(inplace=True),
        nn.Conv2d(units, units, 3, padding=1, groups=units, bias=False), nn.BatchNorm2d(units),
        nn.ReLU6(inplace=True), nn.Conv2d(units, channels, 1, bias=False), nn.BatchNorm2d(channels),
    )  # fmt: skip
    body = nn.Sequential(*body)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    net = Net(
        lambda net, x: net.head((lambda y: y + net.body(y))(net.stem(x))),
        stem=nn.Conv2d(3, channels, 3), body=body, head=head,
    )  # fmt: skip
    for _ in range(10):
        net(torch.randn(8, 3, 12, 12))
    return net.eval()


def test_inverted_residuals_are_found_and_pruned():
    net, x = mobile(), torch.randn(32, 3, 12, 12)
    names = [f"body.{i}" for i in (0, 1, 3, 4, 6)]
    block = NeuronBlock((names[0],), tuple(names[1:4]), names[4], 24, 1)
    assert find_blocks(net, x[:4]) == [block]
    result = prune_neurons(net, [x], 9)
    expand, norm, _, depthwise, _, _, project, _ = result.model.body
    assert expand.out_channels == norm.num_features == project.in_channels == 9
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 9
    assert repr(result.model).count("groups=9") == 1
    with torch.no_grad():  # what is left of each unit is what it was
        deep = nn.Sequential(*net.body[:6])(net.stem(x))[:, result.blocks[0].kept]
        torch.testing.assert_close(nn.Sequential(*result.model.body[:6])(net.stem(x)), deep)


def test_depthwise_convolutions_may_have_many_outputs_for_a_unit():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 10, 10)
    assert find_blocks(net, x[:2]) == [NeuronBlock(("0",), ("1", "2"), "6", 8, 8)]
    with torch.no_grad():
        net[6].weight.unflatten(1, (8, 8))[:, ::2] = 0.0
        expected = net(x)
        result = prune_neurons(net, [x], 4)
        torch.testing.assert_close(result.model(x), expected, atol=1e-5, rtol=1e-4)
    assert result.model[1].groups == 4
    assert result.model[1].out_channels == result.model[2].num_features == 8


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (NeuronBlock(("0",), (), "9", 24, 1), "not there"),
        (NeuronBlock(("0",), (), "4", 24, 1), "24 inputs"),
        (NeuronBlock(("0",), (), "2", 12, 2), "12 outputs"),
        (NeuronBlock(("1",), (), "2", 24, 1), "forward"),
    ],
)
def test_blocks_that_are_none_are_refused(block, reason):
    with pytest.raises(ValueError, match=f"blocks must be blocks of the network, .*{reason}"):
        prune_neurons(layers(), [torch.randn(64, 8)], 6, blocks=[block])


def test_blocks_that_something_else_reads_are_refused():
    block = NeuronBlock(("a",), (), "b", 30, 1)
    with pytest.raises(ValueError, match="something else reads"):
        prune_neurons(NO_BLOCKS["a slice"], [torch.randn(64, 8)], 6, blocks=[block])
