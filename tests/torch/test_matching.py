"""Blocks that are trained, after their layers are replaced, to give the dense outputs."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import Calibration, CompressionWarning, FactorizedLinear, compress  # noqa: E402


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x)))), None  # as transformers do


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, 16, generator=generator) for _ in range(n)]


def small(model, n=10, **options):
    given = Calibration(batches(n), **options)
    return compress(model, "magnitude", density=0.4, layers="blocks", calibration=given)


def distance(model, other):
    with torch.no_grad():
        x = torch.cat(batches(8, seed=2))
        return float((model(x) - other(x)).norm())


@pytest.fixture(scope="module")
def networks():
    dense = Network()
    return dense, small(dense), small(dense, match_blocks=True)


def test_held_out_errors_fall_and_so_do_those_of_fresh_inputs(networks):
    dense, (plain, _), (matched, report) = networks
    blocks = report.metadata["blocks"]
    assert [each["block"] for each in blocks] == ["blocks.0", "blocks.1"]
    assert all(each["after"] < 0.95 * each["before"] for each in blocks)
    assert "2 of 2 blocks matched" in report.metadata["steps"][1]
    assert distance(matched, dense) < 0.95 * distance(plain, dense)


def test_numbers_of_stored_values_and_dense_layers_stay(networks):
    dense, (plain, _), (matched, _) = networks
    for one, other in zip(plain.modules(), matched.modules(), strict=True):
        if isinstance(one, FactorizedLinear):
            assert one.to_product().nnz == other.to_product().nnz
    torch.testing.assert_close(matched.head.weight, dense.head.weight, rtol=0, atol=0)
    assert not torch.equal(matched.blocks[0].norm.weight, dense.blocks[0].norm.weight)
    assert all(parameter.grad is None for parameter in matched.parameters())


def test_frozen_networks_are_matched_and_stay_frozen(networks):
    frozen = copy.deepcopy(networks[0]).requires_grad_(False)
    matched, report = small(frozen, match_blocks=True)
    assert all(each["after"] < each["before"] for each in report.metadata["blocks"])
    assert not any(parameter.requires_grad for parameter in matched.parameters())


def test_the_same_seeds_give_the_same_bits(networks):
    again, _ = small(networks[0], match_blocks=True)
    for one, other in zip(again.parameters(), networks[2][0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("prepared", "n", "note"),
    [
        (lambda model: model.bfloat16(), 10, "single or double precision"),
        (lambda model: model, 1, "at least two batches"),
    ],
)
def test_a_block_that_cannot_be_trained_is_noted(networks, prepared, n, note):
    model = prepared(copy.deepcopy(networks[0]))
    given = Calibration([x.to(model.head.weight.dtype) for x in batches(n)], match_blocks=True)
    _, report = compress(model, "magnitude", density=0.4, layers="blocks", calibration=given)
    assert all(note in each["note"] for each in report.metadata["blocks"])
    assert "0 of 2 blocks matched" in report.metadata["steps"][1]


def test_parameters_that_other_blocks_share_are_not_trained():
    dense = Network()
    dense.blocks[1].norm = dense.blocks[0].norm
    before = copy.deepcopy(dense.blocks[0].norm.state_dict())
    matched, report = small(dense, match_blocks=True)
    assert all(each["after"] <= each["before"] for each in report.metadata["blocks"])
    for name, tensor in matched.blocks[0].norm.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("options", [{"sequential": False}, {"feedback": False}])
def test_it_needs_pairs(options):
    with pytest.raises(ValueError, match=r"match_blocks needs sequential=True and feedback=True"):
        Calibration(batches(4), match_blocks=True, **options)


def test_frozen_norms_stay_where_others_are_trained():
    dense = Network()
    dense.blocks[0].norm.requires_grad_(False)
    matched, _ = small(dense, match_blocks=True, shift_bias=False)
    assert torch.equal(matched.blocks[0].norm.weight, dense.blocks[0].norm.weight)
    assert not torch.equal(matched.blocks[1].norm.weight, dense.blocks[1].norm.weight)


def test_a_run_in_place_that_fails_restores_norms_too():
    dense, told = Network(), []
    before = copy.deepcopy(dense.state_dict())

    def fail(*_):
        told.append(copy.deepcopy(dense.blocks[0].norm.weight))
        if len(told) == 3:
            raise RuntimeError("stopped")

    given = Calibration(batches(10), match_blocks=True)
    with pytest.raises(RuntimeError, match="stopped"):
        compress(dense, "magnitude", density=0.4, layers="blocks", calibration=given,
                 inplace=True, progress=fail)  # fmt: skip
    assert not torch.equal(told[-1], before["blocks.0.norm.weight"])  # trained meanwhile
    after = dense.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_without_a_matched_block_is_warned_of():
    with pytest.warns(CompressionWarning, match="match_blocks has trained none of"):
        small(Network(), n=1, match_blocks=True)


def test_blocks_cannot_be_matched_without_calibration():
    with pytest.raises(ValueError, match="match_blocks needs calibration batches"):
        compress(Network(), "magnitude", density=0.4, match_blocks=True)
