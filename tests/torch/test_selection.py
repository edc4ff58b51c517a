"""Selection of layers, and the reasons for keeping the others."""

import copy
import functools
import io

import pytest
import rich.console

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm  # noqa: E402

from matfact.torch import (  # noqa: E402
    Budget,
    CompressionWarning,
    FactorizedConv,
    FactorizedLinear,
    compress,
    compress_gradually,
    input_statistics,
    layer_options,
)
from matfact.torch.layers._matricized import matricized, refusal  # noqa: E402


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Called(nn.Linear):
    def __call__(self, *args):
        return -super().__call__(*args)


class Inherited(nn.Linear):
    """A subclass that computes what its base does."""

    def description(self):
        return "plain"


class Adapted(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.adapter = nn.Parameter(torch.ones(4, 4))


class Conv1D(nn.Module):
    """A third-party layer with the name of a known one."""

    def __init__(self):
        super().__init__()
        self.nf, self.weight = 4, nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x


class Marked(nn.Parameter):
    """A weight of a class that nobody knows."""


def patched():
    layer = nn.Linear(4, 4)
    own = layer.forward
    layer.forward = functools.wraps(own)(lambda x: own(x) + 1)
    return layer


def with_weight(weight):
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.weight = weight
    return layer


REFUSED = {
    "standardized": (lambda: Standardized(2, 4, 3), "forward"),
    "scaled": (lambda: Scaled(4, 4), "forward"),
    "convolution": (lambda: Doubled(2, 4, 3), "_conv_forward"),
    "called": (lambda: Called(4, 4), "__call__"),
    "patched": (patched, "forward"),
    "adapted": (lambda: Adapted(4, 4), "adapter"),
    "name": (Conv1D, "transformers"),
    "float8": (
        lambda: with_weight(nn.Parameter(torch.ones(4, 4).to(torch.float8_e5m2), False)),
        "float8_e5m2",
    ),
    "packed": (lambda: with_weight(nn.Parameter(torch.ones(8, 1).byte(), False)), "uint8"),
    "unknown": (lambda: with_weight(Marked(torch.ones(4, 4))), "Marked"),
    "axes": (lambda: with_weight(nn.Parameter(torch.ones(1, 4, 4))), "axes"),
    "no weight": (lambda: with_weight(None), "no weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_is_not_what_its_class_says_is_kept_with_the_reason(kind):
    make, reason = REFUSED[kind]
    layer = make()
    assert matricized(layer) is None
    small, report = compress(nn.Sequential(layer, nn.Linear(4, 4)), "magnitude", density=0.5)
    assert [row.status for row in report] == ["kept", "compressed"]
    assert reason in report[0].message
    assert type(small[0]) is type(layer)
    assert report.dense_nbytes == 64 + report[0].dense_nbytes


@pytest.mark.parametrize(
    "layer",
    [
        Inherited(4, 4),
        nn.MultiheadAttention(4, 2).out_proj,
        nn.Conv2d(2, 2, 3, padding="same", padding_mode="reflect", dilation=2),
        nn.Linear(4, 4, dtype=torch.bfloat16),
        with_weight(torch.ones(4, 4)),
    ],
)
def test_a_layer_that_computes_what_its_class_does_is_taken(layer):
    assert refusal(layer) is None
    small, report = compress(nn.Sequential(layer), "magnitude", density=1.0)
    assert report[0].status == "compressed"
    assert isinstance(small[0], (FactorizedLinear, FactorizedConv))


def test_complex_layers_are_taken():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))
    small, report = compress(model, "butterfly")
    assert report[0].status == "compressed"
    assert {p.dtype for p in small.parameters()} == {torch.complex64}
    error = (small[0].weight - model[0].weight).norm() / model[0].weight.norm()
    assert report[0].relative_error == pytest.approx(float(error.detach()), rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
        lambda layer: prune.ln_structured(
            prune.l1_unstructured(layer, "weight", amount=2), "weight", 1, n=1, dim=0
        ),
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_weight_taken_is_the_one_computed_with(change, inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    change(model[0])
    with torch.no_grad():  # as a training step does, after the last call
        for parameter in model.parameters():
            parameter += 0.1
    x = torch.randn(3, 6)
    dense = copy.deepcopy(compress(model, "magnitude", density=1.0).model)  # with nothing computed
    expected = model(x)
    small, report = compress(model, "magnitude", density=1.0, inplace=inplace)
    assert report[0].relative_error < 1e-6
    for network in (dense, small):
        assert isinstance(network[0], FactorizedLinear)
        torch.testing.assert_close(network(x), expected)
    small.train()(x)  # no hook looks for what is no more


def test_reading_a_parametrized_weight_changes_nothing():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4))).train()
    before = copy.deepcopy(model.state_dict())
    compress(model, "magnitude", dry_run=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(module.training for module in model.modules())


def test_calibration_passes_by_layers_that_are_not_taken():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(4, 8), nn.ReLU(), nn.Linear(8, 4), patched())
    x = torch.randn(20, 4)
    assert list(input_statistics(model, [x])) == ["2"]
    small, report = compress(model, "magnitude", density=1.0, calibration=[x])
    assert [row.status for row in report] == ["kept", "compressed", "kept"]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_only_layers_that_are_not_taken_are_kept_with_a_warning():
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    with pytest.warns(CompressionWarning, match="forward"):
        small, report = compress(model, "magnitude", layers=["0"])
    assert [row.status for row in report] == ["kept"]
    assert isinstance(small[0], Scaled)


def test_weights_that_are_not_finite_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.warns(CompressionWarning, match="0 is kept: weight with values"):
        _, report = compress(model, "magnitude", density=0.5)
    assert [row.status for row in report] == ["kept", "compressed"]


def test_weights_that_are_not_in_memory_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(ValueError, match="'2' is a LazyLinear"):
        compress(model, "magnitude")
    model[1].to("meta")
    with pytest.raises(ValueError, match="'1' is on the meta device"):
        compress(model, "magnitude", layers=["0", "1"])
    _, report = compress(model, "magnitude", layers=["0", "1"], overrides={"1": None})
    assert [row.status for row in report] == ["compressed", "kept"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": ["0", "lm_haed"]}, "layers .* 'lm_haed' is none.*near it: lm_head"),
        ({"layers": ["act"]}, "layers .* 'act' is none"),
        ({"layers": "haed"}, "layers .* 'haed'"),
        ({"layers": "head["}, r"layers .*'head\['"),
        ({"overrides": {"lm_haed": None}}, "overrides .* 'lm_haed' is none.*near it: lm_head"),
        ({"overrides": {"head[": None}}, r"overrides .*'head\['"),
        ({"budget": Budget(0.5, weights={"lm_haed": 2.0})}, "weights .*near it: lm_head"),
    ],
)
def test_names_of_no_layer_are_refused_with_near_ones(parameters, message):
    model = nn.ModuleDict({"0": nn.Linear(8, 8), "act": nn.ReLU(), "lm_head": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match=message):
        compress(model, "magnitude", **parameters)


def test_overrides_may_be_of_layers_that_are_not_selected():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Scaled(4, 4))
    overrides = {"1": None, "2": 0.5}
    _, report = compress(model, "magnitude", layers=["0"], overrides=overrides)
    assert [row.layer for row in report] == ["0"]


@pytest.mark.parametrize(
    "tied",
    [
        lambda a, b: setattr(b, "weight", a.weight),
        lambda a, b: setattr(b, "bias", a.bias),
        lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.detach().T)),
    ],
)
def test_layers_that_share_a_parameter_are_kept(tied):
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    tied(a, b)
    model = nn.Sequential(a, b, nn.Linear(4, 4))
    _, report = compress(model, "magnitude", inplace=True)  # copies tie no mere views
    assert [row.status for row in report] == ["kept", "kept", "compressed"]
    assert "shared" in report[0].message


@pytest.mark.parametrize("cost", ["nbytes", "flops", "seconds"])
def test_budgets_count_layers_that_are_not_taken(cost):
    float8, _ = REFUSED["float8"]
    model = nn.Sequential(nn.Linear(4, 64), Scaled(64, 4), nn.Linear(4, 64), float8())
    x = torch.randn(8, 4)
    del model[3].bias
    model[3].forward = lambda x: x
    budget = Budget(1.0 if cost == "seconds" else 0.95, cost)  # times differ from run to run
    _, report = compress(model, "magnitude", budget=budget, calibration=[x])
    assert [row.status for row in report][1::2] == ["kept", "kept"]
    assert cost == "seconds" or "compressed" in {row.status for row in report}
    assert set(layer_options(model, ["magnitude"], [0.5])) == {"0", "1", "2", "3"}


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(2, 4, 3, groups=2)])
def test_a_network_may_be_one_layer(layer):
    x = torch.randn(5, *((8,) if isinstance(layer, nn.Linear) else (2, 6, 6)))
    small, report = compress(layer, "magnitude", density=1.0, calibration=[x])
    assert isinstance(small, (FactorizedLinear, FactorizedConv))
    torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-4)
    assert [row.status for row in report] == ["compressed"]
    again, _ = compress(small, "magnitude", density=0.5)
    assert again(x).shape == layer(x).shape
    twice, _ = compress_gradually(layer, "magnitude", density=0.5, train=lambda *_: 0, n_stages=2)
    torch.testing.assert_close(twice(x), again(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="inplace"):
        compress(layer, "magnitude", inplace=True)


def test_reports_tell_the_share_of_what_is_in_no_layer(tmp_path):
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "gru": nn.GRU(8, 8), "out": nn.Linear(8, 8)})
    _, report = compress(model, "magnitude")
    shares = report.metadata["untouched"]
    assert list(shares) == [f"{m}.weight_{w}_l0" for m in ("lstm", "gru") for w in ("ih", "hh")]
    n_parameters = sum(p.numel() for p in model.parameters())
    assert sum(shares.values()) == pytest.approx(14 * 64 / n_parameters)
    report.to_html(tmp_path / "report.html")
    assert f"{256 / n_parameters:.1%}" in (tmp_path / "report.html").read_text(encoding="utf-8")
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    assert f"lstm.weight_ih_l0 ({256 / n_parameters:.1%})" in " ".join(
        console.export_text().split()
    )


def test_layers_that_accelerate_moves_inputs_for_are_taken():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    hooks.add_hook_to_module(model[1], hooks.ModelHook())
    x = torch.randn(5, 4)
    small, report = compress(model, "magnitude", density=1.0, calibration=[x])
    assert [row.status for row in report] == ["compressed", "kept"]
    assert isinstance(small[0]._hf_hook, hooks.AlignDevicesHook)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert compress(small, "magnitude").report[0].status == "compressed"


def test_batches_that_can_be_used_once_are_refused_before_any_work():
    model, done = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), []
    with pytest.raises(ValueError, match="must be a collection"):
        compress(
            model, "magnitude", calibration=(torch.ones(2, 4) for _ in range(2)),
            reestimate_batchnorm=True, progress=lambda *row: done.append(row),
        )  # fmt: skip
    assert not done
