"""Networks of quantized values and signs: compression, reports, budgets, files."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact import (  # noqa: E402
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    LowRank,
    MagnitudePruner,
    Quantized,
)
from matfact.factorizers._base import BaseFactorizer, Factorization  # noqa: E402
from matfact.operators import DenseFactor, FactorProduct  # noqa: E402
from matfact.report import CompressionReport  # noqa: E402
from matfact.solvers.finalize import scaled_columns  # noqa: E402
from matfact.torch import (  # noqa: E402
    Budget,
    compress,
    compress_gradually,
    layer_options,
    load_network,
    save_network,
)
from matfact.torch.layers._coded import is_coded  # noqa: E402
from matfact.torch.layers._inherit import copied  # noqa: E402
from matfact.torch.pruning import count_flops, prune_network  # noqa: E402

SIGNS = DoubleBinaryFactorizer(bits=3, max_iter=5)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.Flatten(),
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10),
    ).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def dense_of(model):
    """Return the network with the dense weights of its compressed layers."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_children()):
        if hasattr(layer, "to_dense"):
            model.set_submodule(name, layer.to_dense())
    return model


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (SIGNS, {}),
        (LowRank(), {"density": 0.5, "value_bits": 4}),
        (MagnitudePruner(), {"density": 0.5, "value_bits": 8}),
        (Quantized(MagnitudePruner(density=0.5), bits=3), {}),
    ],
    ids=["signs", "lowrank", "magnitude", "quantized"],
)
def test_compressed_networks_compute_with_their_weights_and_come_back_to_the_bit(
    method, given, network, images, tmp_path
):
    small, report = compress(network, method, **given)
    assert all(row.status == "compressed" for row in report)
    assert any(map(is_coded, small.modules()))
    with torch.no_grad():
        for training in (False, True):
            found = small.train(training)(images)
            expected = dense_of(small)(images)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        small.eval()
        save_network(small, tmp_path / "net", report=report)
        for target in (copied(network), copied(small), lambda: copied(network)):
            again = load_network(target, tmp_path / "net").eval()
            state = again.state_dict()
            assert all(torch.equal(t, state[name]) for name, t in small.state_dict().items())
            assert torch.equal(again(images), small(images))


def test_half_precision_comes_back_to_the_bit(network, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        model = copy.deepcopy(network).to(dtype)
        for layers in ("[024]", "6"):
            model, _ = compress(model, "magnitude", density=0.4, value_bits=4, layers=layers)
        with torch.no_grad():
            model[6].chain[0].scales.mul_(1e-4)  # of which float16 holds few bits
        folder = tmp_path / str(dtype)
        save_network(model, folder)
        state = load_network(copy.deepcopy(network).to(dtype), folder).state_dict()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_reports_tell_the_bits_of_each_layer(network, tmp_path):
    W = network[4].weight.detach().numpy()
    quantized = Quantized(DoubleSparseFactorizer(density=0.4, max_iter=5), bits=4)
    given = {"4": quantized, "6": "lowrank"}
    _, report = compress(network, "magnitude", layers="[46]", overrides=given, value_bits=8)
    fitted = quantized.fit(W)
    assert report[0].bits_per_weight == pytest.approx(fitted.bits_per_weight_)
    assert report[0].method == "Quantized(DoubleSparseFactorizer)"
    assert report[0].requested_density == 0.4
    assert report[1].method == "Quantized(LowRank)"
    assert report[1].bits_per_weight == 8 * report[1].nbytes / network[6].weight.numel()
    entries = sum(row.rows * row.columns for row in report)
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / entries)
    for write, read in ((report.to_csv, None), (report.to_json, CompressionReport.from_json)):
        write(tmp_path / "report")
        assert str(report[0].bits_per_weight) in (tmp_path / "report").read_text()
        assert read is None or read(tmp_path / "report").rows == report.rows
    report.to_html(tmp_path / "report.html")
    assert f"{report[0].bits_per_weight:.3f}" in (tmp_path / "report.html").read_text()
    cells = [list(column.cells) for column in report.table().columns if column.header == "bits"]
    assert str(cells[0][0]) == f"{report[0].bits_per_weight:.2f}"


def test_bits_of_signs_are_never_exceeded(network):
    _, report = compress(network, "double_binary", layers="[46]", overrides={"4": SIGNS})
    assert report[0].bits_per_weight <= 3
    assert all(row.requested_density is None for row in report)


@pytest.mark.parametrize("calibrated", [False, True])
def test_eight_bits_hardly_raise_the_error(calibrated, network):
    model = nn.Sequential(network[4])
    inputs = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(2))
    given = {"density": 0.5, "calibration": list(inputs) if calibrated else None}
    plain, rounded = (
        compress(model, "magnitude", value_bits=bits, **given).report[0] for bits in (None, 8)
    )
    assert rounded.relative_error == pytest.approx(plain.relative_error, rel=0.02)
    assert rounded.nbytes < plain.nbytes / 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "double_binary", "density": 0.25}, "density must be None with DoubleBinary"),
        ({"overrides": {"4": ("double_binary", 0.5)}}, "density must be None with DoubleBinary"),
        ({"method": "double_binary", "value_bits": 4}, "value_bits must be None with DoubleBinary"),
        ({"value_bits": 9}, "value_bits must be None or an integer from 2 to 8, got 9"),
        ({"value_bits": True}, "value_bits must be None or an integer"),
        ({"overrides": {"4": ("dsf", 0.5, 1)}}, "value_bits must be None or an integer"),
        ({"value_bits": 4, "budget": 0.5}, "value_bits must be None with a budget"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(given, message, network):
    with pytest.raises(ValueError, match=message):
        compress(network, **given, dry_run=True)


class Rounded(BaseFactorizer):
    """Rounds the matrix, without regard to inputs."""

    def __init__(self, bits=4):
        self.bits = bits

    def _factorize(self, W, history):
        return Factorization(FactorProduct([DenseFactor(W)]).quantized(self.bits).factors)


@pytest.mark.parametrize("adapt", ["finalize", "scale", "none"])
def test_codes_are_neither_scaled_nor_refitted_to_inputs(adapt, network):
    model = nn.Sequential(network[4])
    inputs = list(torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(2)))
    small, report = compress(model, Rounded(3), calibration=inputs, adapt=adapt)
    expected = Rounded(3).fit(network[4].weight.detach().numpy()).operator_
    found = small[0].to_product()
    assert np.array_equal(found[0].values.numpy(), expected[0].values)
    assert np.array_equal(found[0].scales.numpy(), expected[0].scales)
    assert report[0].bits_per_weight == pytest.approx(expected.bits_per_weight)
    with pytest.raises(TypeError, match="its values are codes"):
        scaled_columns(expected, np.ones(64))


def test_budgets_choose_bits_and_are_kept(network):
    budget = Budget(0.25, densities=(0.2, 0.4, 0.7), value_bits=(None, 8, 4), bits=(2, 4))
    methods = ["magnitude", "lowrank", SIGNS]
    small, report = compress(network, methods, budget=budget)
    assert report.nbytes <= 0.25 * report.dense_nbytes
    assert any(map(is_coded, small.modules()))
    plain = Budget(0.25, densities=budget.densities)
    _, other = compress(network, methods[:2], budget=plain)

    def error(rows):
        return math.fsum((row.relative_error or 0.0) ** 2 for row in rows)

    assert error(report) < error(other)


def test_options_have_the_bytes_of_the_network_compressed_by_them(network):
    options = layer_options(
        network, ["magnitude", SIGNS], [0.3, 0.6], layers="4", value_bits=(None, 4), bits=(2, 3)
    )["4"]
    assert [(o.method, o.bits) for o in options] == [
        ("dense", None), *[("magnitude", bits) for bits in (None, 4)] * 2,
        ("DoubleBinaryFactorizer", 2), ("DoubleBinaryFactorizer", 3),
    ]  # fmt: skip
    for option in options[1:5]:
        override = (option.method, option.density, option.bits)
        report = compress(network, layers="4", overrides={"4": override}).report
        assert report.nbytes == option.nbytes


@pytest.mark.parametrize("given", [{"value_bits": ()}, {"value_bits": (None, 1)}])
def test_budgets_with_other_bits_are_refused(given):
    with pytest.raises(ValueError, match="value_bits must"):
        Budget(0.5, **given)


def test_gradual_compression_quantizes_in_every_stage(network):
    small, report = compress_gradually(
        network, "magnitude", density=0.3, n_stages=2, value_bits=6, train=lambda model, stage: None
    )
    assert all(map(is_coded, small[4].chain))
    assert all(row.density <= 0.3 for row in report)


def test_pruning_leaves_codes_alone_and_says_so(network):
    small, _ = compress(network, "magnitude", density=0.5, value_bits=4, layers="4")
    before = copy.deepcopy(small[4].state_dict())
    report = prune_network(small, keep=0.5, method="magnitude")
    assert report.left_out == {"4": "its factors store codes of few bits"}
    assert all(torch.equal(before[name], t) for name, t in small[4].state_dict().items())
    with pytest.raises(ValueError, match="stores codes of few bits"):
        count_flops(small, torch.zeros(1, 4, 4, 4))


def test_sixteen_bits_of_scales_are_kept_in_files(network, tmp_path):
    small, report = compress(network, "magnitude", density=0.5, value_bits=4, layers="4")
    save_network(small, tmp_path / "net")
    size = sum(path.stat().st_size for path in (tmp_path / "net").iterdir())
    others = sum(t.nbytes for name, t in network.state_dict().items() if name != "4.weight")
    assert report[0].nbytes <= size - others <= report[0].nbytes + 6000
    assert np.isfinite(report[0].bits_per_weight)
