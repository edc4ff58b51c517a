"""Pruning of units in networks with batches of all kinds."""

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from matfact.torch.neurons import NeuronBlock, find_blocks, prune_neurons  # noqa: E402


class Masked(nn.Module):
    """Sees some of the tokens, drawn anew in each pass, also in eval mode."""

    drawn: ClassVar[list[bytes]] = []

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 12)
        self.up = nn.ModuleList(nn.Linear(12, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 12) for _ in range(2))

    def forward(self, x):
        kept = torch.rand(x.shape[:2]).argsort(1)[:, :6, None]
        self.drawn.append(kept.numpy().tobytes())
        x = self.stem(x.gather(1, kept.expand(-1, -1, x.shape[2])))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(functional.gelu(up(x)))
        return self.head(x)


def test_random_numbers_are_the_same_in_all_passes():
    net, mix = Masked().eval(), torch.randn(4, 12)
    batches = [torch.randn(16, 20, 4) @ mix for _ in range(4)]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    blocks = find_blocks(net, batches[0])
    assert len(set(net.drawn)) == 1
    net.drawn.clear()
    result = prune_neurons(net, batches, 12)
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn from the caller's numbers
    assert [pruned.block for pruned in result.blocks] == blocks
    # Of each batch, two passes for each of two blocks.
    counts = sorted(Counter(net.drawn).values())
    assert counts[:4] == [4] * 4
    assert len(counts) == 5  # and all trials
    with torch.no_grad():
        outputs = []
        for model in (net, result.model):
            torch.manual_seed(1)
            outputs.append(torch.cat([model(x) for x in batches]))
    assert (outputs[1] - outputs[0]).norm() < 0.1 * outputs[0].norm()


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize("fails", ["batch", "progress"])
def test_a_failure_in_place_leaves_the_network_as_it_was(fails):
    net, x = layers(), torch.randn(64, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    bad = [x, x * torch.nan] if fails == "batch" else [x]

    def stop(pruned):
        raise RuntimeError("enough")

    with pytest.raises((ValueError, RuntimeError), match=r"batch 1 .* at '2'|enough"):
        prune_neurons(net, bad, 4, inplace=True, progress=stop)
    assert repr(net) == repr(layers())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_batches_may_be_empty_and_come_from_a_loader_with_labels():
    net, x = layers(), torch.randn(64, 8)
    loader = DataLoader(TensorDataset(x, torch.zeros(64)), 16)
    by_loader = prune_neurons(net, loader, 6)
    by_list = prune_neurons(net, [x[:0], *x.split(16), x[:0]], 6)
    for one, other in zip(by_loader.blocks, by_list.blocks, strict=True):
        np.testing.assert_array_equal(one.kept, other.kept)
    for refused in ([x[:0]], (part for part in x.split(16))):
        with pytest.raises(ValueError, match="batches must"):
            prune_neurons(net, refused, 6)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_are_rows_of_all_samples():
    net, parts = layers(), [torch.randn(5, 8), torch.randn(60, 8)]
    nested = prune_neurons(net, [torch.nested.nested_tensor(parts)], 12)
    plain = prune_neurons(net, [torch.cat(parts)], 12)
    assert len(nested.blocks) == 2
    for one, other in zip(nested.blocks, plain.blocks, strict=True):
        np.testing.assert_array_equal(one.kept, other.kept)


def test_padding_does_not_count():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layers()

        def forward(self, x, attention_mask):
            return self.net(x)

    x, mask = torch.randn(4, 20, 8), torch.ones(4, 20)
    mask[:, 15:] = 0
    batch = {"x": torch.where(mask[..., None] > 0, x, 100.0), "attention_mask": mask}
    padded = prune_neurons(Padded(), [batch], 12)
    plain = prune_neurons(layers(), [x[:, :15].reshape(-1, 8)], 12)
    for one, other in zip(padded.blocks, plain.blocks, strict=True):
        np.testing.assert_array_equal(one.kept, other.kept)


def test_experts_without_tokens_stay_as_they_are():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(layers() for _ in range(2))

        def forward(self, x):
            first = x[:, 0] < 100
            return torch.cat([self.experts[0](x[first]), self.experts[1](x[~first])])

    net, x = Routed(), torch.randn(64, 8)
    far = x.clone()
    far[::2, 0] += 200
    blocks = find_blocks(net, far)
    assert len(blocks) == 4
    result = prune_neurons(net, [x], 12, blocks=[b for b in blocks if b.consumer[8] == "0"])
    assert all(np.isfinite(pruned.error) for pruned in result.blocks)
    assert [type(p) for p in result.model.experts[1]] == [type(p) for p in net.experts[1]]
    assert prune_neurons(net, [x], 12).blocks[0].block.consumer == "experts.0.2"


def test_rows_routed_elsewhere_are_not_taken_for_pairs():
    # What goes to the expert depends on the units that are cut before it.
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.expert = layers(), layers()
            self.between = nn.Linear(3, 8)

        def forward(self, x):
            y = self.first(x)
            chosen = y[:, 0].argsort()[:100]
            return self.expert(self.between(y[chosen]))

    torch.manual_seed(0)
    net, batches = Routed(), [torch.randn(200, 8) for _ in range(3)]
    blocks = find_blocks(net, batches[0])
    errors = [p.error for p in prune_neurons(net, batches, 4, blocks=blocks).blocks]
    alone = prune_neurons(net, batches, 4, blocks=[b for b in blocks if "expert" in b.consumer])
    assert max(errors[2:]) < 3 * max(pruned.error for pruned in alone.blocks)


def test_few_samples_leave_weights_as_they_are_where_nothing_tells_another():
    net, few, x = layers(), torch.randn(5, 8), torch.randn(100, 8)
    with torch.no_grad():
        same = prune_neurons(net, [few], 1.0).model(x)
        torch.testing.assert_close(same, net(x), atol=1e-5, rtol=1e-4)


def test_zeros_are_no_evidence():
    net = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    block = NeuronBlock(("0",), (), "2", 6, 1)
    (pruned,) = prune_neurons(net, [torch.zeros(4, 8)], 2, blocks=[block]).blocks
    assert len(pruned.kept) == 6
    assert np.isnan(pruned.error)


def test_outputs_written_over_afterwards_are_seen_as_they_were():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 6, bias=False), nn.ReLU(True))
    x = torch.randn(100, 8)
    result = prune_neurons(net, [x], 12)
    with torch.no_grad():
        wanted, got = net[:3](x), result.model[:3](x)
    assert result.blocks[0].error == pytest.approx(
        float((got - wanted).norm() / wanted.norm()), 1e-3
    )


def test_wrapped_and_compiled_networks_are_pruned():
    x = torch.randn(64, 8)
    compiled = torch.compile(layers(), backend="eager")
    with torch.no_grad():
        compiled(x)  # compiled code calls no hooks that come later
    for wrapped in (nn.DataParallel(layers()), compiled):
        result = prune_neurons(wrapped, [x], 6)
        assert [len(pruned.kept) for pruned in result.blocks] == [6, 6]


def test_flags_of_gradients_are_kept():
    net = layers()
    net[0].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    pruned = prune_neurons(net, [torch.randn(64, 8)], 6).model
    assert [p.requires_grad for p in pruned.parameters()] == flags
