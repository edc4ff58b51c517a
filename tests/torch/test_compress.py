"""Whole networks: which layers change, what is reported, what accuracy is left."""

import copy
import csv
import gc
import io
import json
import tracemalloc
import weakref
from typing import ClassVar

import numpy as np
import pytest
import rich.console
from joblib import parallel_config
from sklearn.base import clone

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact import DoubleSparseFactorizer, LowRank, MagnitudePruner  # noqa: E402
from matfact.calibration import InputStatistics  # noqa: E402
from matfact.torch import (  # noqa: E402
    CompressionReport,
    FactorizedConv,
    FactorizedLinear,
    compress,
    reestimate_batch_norm,
)
from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside  # noqa: E402
from matfact.torch.compression._fit import fit_layer  # noqa: E402


def statuses(report):
    return {row.layer: row.status for row in report}


@pytest.mark.parametrize("method", ["magnitude", "dsf", "lowrank", "blocksvd", "monarch"])
def test_a_trained_network_keeps_most_of_its_accuracy(mlp, digits, method):
    small, report = compress(mlp, method, density=0.5, keep=("last",))
    assert digits.accuracy(mlp) > 0.95
    assert digits.accuracy(small) > 0.85
    assert all(row.density <= 0.5 for row in report if row.status == "compressed")


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "dsf", "monarch"])
def test_calibration_lowers_the_error_of_outputs(cnn, digits, method, sequential):
    plain, _ = compress(cnn, method, density=0.4, layers="3|7")
    calibrated, report = compress(
        cnn, method, density=0.4, layers="3|7", calibration=digits.batches, sequential=sequential
    )
    with torch.no_grad():
        dense, *others = (m(digits.test_x) for m in (cnn, plain, calibrated))
    errors = [float((other - dense).norm() / dense.norm()) for other in others]
    assert errors[1] < 0.8 * errors[0]
    assert all(0 < row.layer_error < 1 for row in report)


@pytest.mark.parametrize("feedback", [True, False])
def test_batches_in_files_give_the_same_network(cnn, digits, tmp_path, feedback):
    options = {"density": 0.4, "layers": "3|7", "calibration": digits.batches, "feedback": feedback}
    in_memory, _ = compress(cnn, "magnitude", **options)
    in_files, _ = compress(cnn, "magnitude", offload_folder=tmp_path, **options)
    with torch.no_grad():
        torch.testing.assert_close(in_files(digits.test_x), in_memory(digits.test_x))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="offload_folder must be an existing folder"):
        compress(cnn, "magnitude", offload_folder=tmp_path / "missing", **options)


def test_the_same_seed_gives_the_same_network_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    batches = [torch.randn(300, 64) for _ in range(2)]
    method, found = DoubleSparseFactorizer(0.3, max_iter=5), []
    for _ in range(2):
        small, _ = compress(model, method, calibration=batches)
        found.append([parameter.detach() for parameter in small.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(384, 768), (768, 384)])
def test_a_fit_takes_ten_times_the_memory_of_its_matrix(shape):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape).astype(np.float32)
    X = rng.standard_normal((1000, shape[1])) * np.geomspace(1, 10, shape[1])
    inputs = InputStatistics().update(X)
    method = DoubleSparseFactorizer(density=0.5, max_iter=25)
    fit_layer(clone(method).set_params(max_iter=1), [W[:20, :30]], None)  # compiles kernels
    tracemalloc.start()
    try:
        fitted = fit_layer(method, [W], LayerStatistics([inputs], [InputStatistics()]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * W.nbytes  # 8.7 are enough
    assert fitted.fitted_layer_error < 0.15
    assert fitted.layer_error is None  # nothing was kept aside


def test_more_adaptation_to_inputs_gives_smaller_errors_of_outputs(cnn, digits):
    errors = []
    for adapt in ("none", "scale", "finalize_one", "finalize"):
        _, report = compress(
            cnn, "dsf", density=0.3, layers=["7"], calibration=digits.batches, adapt=adapt
        )
        errors.append((report[0].fitted_layer_error, report[0].layer_error))
    fitted, aside = zip(*errors, strict=True)
    assert fitted == tuple(sorted(fitted, reverse=True))
    assert min(aside) == aside[-1]
    assert fitted[-1] < 0.8 * fitted[0]


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_pruners_that_use_inputs_beat_magnitude_on_outputs(mlp, digits, method):
    errors = [
        compress(mlp, m, density=0.3, calibration=digits.batches, adapt="none", layers=["1"])
        .report[0]
        .layer_error
        for m in (method, "magnitude")
    ]
    assert errors[0] < errors[1]


def test_later_layers_make_up_for_earlier_ones_and_biases_for_what_is_lost(mlp, digits):
    errors = []
    for feedback, shift_bias in ((False, False), (True, False), (True, True)):
        small, report = compress(
            mlp, "magnitude", density=0.2, calibration=digits.batches, adapt="finalize",
            feedback=feedback, shift_bias=shift_bias,
        )  # fmt: skip
        with torch.no_grad():
            errors.append(float((small(digits.test_x) - mlp(digits.test_x)).norm()))
        assert ("feedback" in report.metadata["steps"][0]) == feedback
        assert ("shifted biases" in report.metadata["steps"][0]) == shift_bias
    assert errors == sorted(errors, reverse=True)


def test_feedback_helps_with_fewer_samples_than_inputs(mlp, digits):
    batches = [digits.batches[0][0][:40]]
    errors = []
    for feedback in (False, True):
        small, _ = compress(
            mlp, "magnitude", density=0.2, calibration=batches, feedback=feedback, shift_bias=False
        )
        with torch.no_grad():
            errors.append(float((small(digits.test_x) - mlp(digits.test_x)).norm()))
    assert errors[1] < errors[0]


def test_shifted_biases_keep_the_mean_of_outputs(cnn, digits):
    small, _ = compress(cnn, "magnitude", density=0.2, layers=["0"], calibration=digits.batches)
    fitted = [x for i, (x, _) in enumerate(digits.batches) if not is_aside(i)]
    with torch.no_grad():
        means = [torch.cat([model[0](x) for x in fitted]).mean((0, 2, 3)) for model in (cnn, small)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


def test_the_network_given_is_changed_only_in_place(mlp):
    before = copy.deepcopy(mlp.state_dict())
    small, _ = compress(mlp, "magnitude", density=0.5)
    assert all(torch.equal(mlp.state_dict()[name], before[name]) for name in before)
    assert isinstance(small[1], FactorizedLinear)
    same, _ = compress(mlp, "magnitude", density=0.5, inplace=True)
    assert same is mlp
    assert isinstance(mlp[1], FactorizedLinear)


def test_modes_and_dtypes_are_those_of_the_layers_replaced(cnn):
    cnn = cnn.to(torch.bfloat16).train()
    cnn[7].eval()
    small, _ = compress(
        cnn, "magnitude", density=0.5, calibration=[torch.ones(2, 1, 8, 8).bfloat16()]
    )
    assert isinstance(small[0], FactorizedConv)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert [module.training for module in small] == [module.training for module in cnn]


def test_layers_and_overrides_say_what_is_compressed_and_how(mlp):
    overrides = {"5": ("lowrank", 0.3), "^3$": None, "[13]": 0.9}
    _, report = compress(mlp, MagnitudePruner(), density=0.5, overrides=overrides)
    assert [(r.layer, r.status, r.method, r.requested_density) for r in report] == [
        ("1", "compressed", "MagnitudePruner", 0.9),
        ("3", "kept", "", None),
        ("5", "compressed", "LowRank", 0.3),
    ]
    assert statuses(compress(mlp, layers="[35]", dry_run=True).report) == {
        "3": "planned",
        "5": "planned",
    }
    _, report = compress(mlp, layers=lambda name, layer: layer.out_features == 10, dry_run=True)
    assert list(statuses(report)) == ["5"]
    _, report = compress(mlp, layers=["1", "3"], keep=("first", "last"), dry_run=True)
    assert set(statuses(report).values()) == {"kept"}


def test_jobs_do_not_change_the_result(mlp):
    with parallel_config(backend="threading"):  # processes would take seconds to start
        one, two = (compress(mlp, "magnitude", density=0.3, n_jobs=n).model for n in (1, 2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_too_small_for_the_structure_is_kept_with_a_warning(mlp):
    with pytest.warns(UserWarning, match="density"):
        small, report = compress(mlp, "lowrank", density=0.02)
    assert statuses(report)["5"] == "kept"
    assert "density" in report[-1].message
    assert isinstance(small[5], nn.Linear)


def test_a_layer_no_batch_reaches_is_fitted_without_inputs(digits):
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x):
            return self.used(x.flatten(1))

    for sequential in (True, False):
        with pytest.warns(UserWarning, match="idle"):
            _, report = compress(
                Detour(), "magnitude", calibration=digits.batches, sequential=sequential
            )
        assert [row.layer_error is None for row in report] == [False, True]


def test_weights_shared_with_an_embedding_are_kept():
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20)})
    model["head"].weight = model["embedding"].weight
    model["twin"] = model["other"] = nn.Linear(8, 8)
    small, report = compress(model, "magnitude")
    assert statuses(report) == {"head": "kept", "twin": "compressed"}
    assert small["twin"] is small["other"]


def test_attention_that_reads_the_weight_of_its_projection_still_works():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    small, _ = compress(layer, "magnitude", density=1.0)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(small(x), layer(x))


def test_a_factorized_network_can_be_compressed_further(mlp):
    half, _ = compress(mlp, "magnitude", density=0.5)
    quarter, _ = compress(half, "magnitude", density=0.25)
    direct, _ = compress(mlp, "magnitude", density=0.25)
    for a, b in zip(quarter.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_reports_agree_in_every_format(mlp, tmp_path):
    _, report = compress(mlp, "magnitude", density=0.25, overrides={"5": None})
    for form in ("csv", "json", "html"):
        getattr(report, f"to_{form}")(tmp_path / f"report.{form}")
    assert CompressionReport.from_json(tmp_path / "report.json").rows == report.rows
    with open(tmp_path / "report.csv", encoding="utf-8") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["1", "3", "5"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<tr>") == 4
    assert "<script" not in html
    assert report.table().row_count == 4
    assert report.nbytes < report.dense_nbytes
    entries = np.array([64 * 64, 64 * 64, 640])
    np.testing.assert_allclose(report.density, entries @ [0.25, 0.25, 1] / entries.sum())
    assert json.loads((tmp_path / "report.json").read_text())["metadata"]["density"] == 0.25


class Counted(nn.Linear):
    """A layer whose copies are counted while they live."""

    alive: ClassVar = weakref.WeakSet()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.alive.add(self)


@pytest.mark.parametrize("batches", [None, [torch.ones(4, 8)]])
def test_layers_that_are_replaced_are_let_go(batches):
    model = nn.Sequential(*(Counted(8, 8) for _ in range(4)))
    alive = []
    compress(
        model, "magnitude", calibration=batches,
        progress=lambda row, _: alive.append(len(Counted.alive)),
    )  # fmt: skip
    assert all(count <= 4 - i for i, count in enumerate(alive))  # the one at hand may be there


def test_layers_that_are_replaced_in_place_are_let_go_in_the_end():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    layers = [weakref.ref(layer) for layer in model]
    compress(model, "magnitude", inplace=True)
    gc.collect()
    assert not any(layer() for layer in layers)


def test_names_in_a_page_are_no_markup(tmp_path):
    model = nn.ModuleDict({"<b>": nn.Linear(4, 4)})
    compress(model, "magnitude").report.to_html(tmp_path / "report.html")
    assert "<b>" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_batch_norm_is_averaged_over_the_batches(cnn, digits):
    small, report = compress(
        cnn, "magnitude", density=0.2, calibration=digits.batches, reestimate_batchnorm=True
    )
    assert "batch-norm statistics of 2 layers re-estimated" in report.metadata["steps"]
    with torch.no_grad():
        means = [small[0](x).mean((0, 2, 3)) for x, _ in digits.batches]
    torch.testing.assert_close(small[1].running_mean, torch.stack(means).mean(0))
    assert small[1].momentum == cnn[1].momentum
    assert reestimate_batch_norm(nn.Sequential(nn.Linear(2, 2)), []) == 0


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"density": 1.5}, "density"),
        ({"method": "unknown"}, "method"),
        ({"layers": "nothing"}, "layers"),
        ({"overrides": {"1": 2.0}}, "density"),
        ({"reestimate_batchnorm": True}, "reestimate_batchnorm"),
        ({"adapt": "somehow"}, "adapt"),
        ({"method": LowRank(), "calibration": []}, "batches"),
    ],
)
def test_bad_parameters_are_refused_by_name(mlp, parameters, name):
    with pytest.raises(ValueError, match=name):
        compress(mlp, **parameters)


def test_matrices_that_no_layer_holds_are_named():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.ModuleDict({"words": nn.Embedding(9, 16), "encoder": encoder})
    small, report = compress(model, "lowrank", density=0.9)
    untouched = ["words.weight", "encoder.self_attn.in_proj_weight"]
    assert list(report.metadata["untouched"]) == untouched
    n_parameters = sum(p.numel() for p in model.parameters())
    shares = [9 * 16 / n_parameters, 48 * 16 / n_parameters]
    np.testing.assert_allclose(list(report.metadata["untouched"].values()), shares)
    assert {row.layer for row in report} >= {"encoder.self_attn.out_proj", "encoder.linear1"}
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    assert "not in a linear layer or convolution" in console.export_text()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # the attention reads the weight of its output projection
        error = (small["encoder"](x) - encoder(x)).norm() / encoder(x).norm()
    assert error < 0.5


def test_factorizers_given_are_left_unfitted_and_free_what_they_found():
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    factorizer = MagnitudePruner()
    found = []

    class Watched(MagnitudePruner):
        def fit(self, *args, **kwargs):
            found.append(weakref.ref(self))
            return super().fit(*args, **kwargs)

    def alive(row, count):
        gc.collect()
        assert [reference() for reference in found] == [None] * len(found)

    compress(network, Watched(), density=0.5, calibration=[torch.randn(9, 16)], progress=alive)
    assert len(found) == 2
    compress(network, factorizer, density=0.5)
    assert not hasattr(factorizer, "operator_")
