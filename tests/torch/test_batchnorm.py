"""Batch-norm statistics after compression: a repair that is named in every report."""

import io
import json

import pytest

torch = pytest.importorskip("torch")
from rich.console import Console  # noqa: E402
from torch import nn  # noqa: E402

from matfact.torch import compress, reestimate_batch_norm  # noqa: E402


def test_reestimation_repairs_and_touches_nothing_but_statistics(cnn, digits):
    small, _ = compress(cnn, "magnitude", density=0.1)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    accuracy = digits.accuracy(small)
    small[1].momentum = 0.3
    small.train()
    assert reestimate_batch_norm(small, digits.batches) == 2
    changed = {k for k, v in small.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.rpartition(".")[2] for name in changed} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    assert (small[1].momentum, small.training) == (0.3, True)
    assert digits.accuracy(small) > accuracy + 0.1


def test_statistics_are_those_of_all_batches_together(digits):
    torch.manual_seed(0)
    x = torch.cat([batch[0] for batch in digits.batches[:4]])
    norm = nn.BatchNorm2d(1)
    assert reestimate_batch_norm(nn.Sequential(norm), x.split(128)) == 1
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=0.02, atol=0)


def test_every_form_of_a_report_names_the_step(cnn, digits, tmp_path):
    _, report = compress(
        cnn, "magnitude", density=0.3, calibration=digits.batches[:2], reestimate_batchnorm=True
    )
    step = "batch-norm statistics of 2 layers re-estimated"
    terminal = io.StringIO()
    Console(width=120, file=terminal).print(report.table())
    report.to_json(tmp_path / "report.json")
    report.to_html(tmp_path / "report.html")
    assert step in " ".join(terminal.getvalue().split())
    assert step in json.loads((tmp_path / "report.json").read_text())["metadata"]["steps"]
    assert step in (tmp_path / "report.html").read_text()
    assert compress(cnn, "magnitude", density=0.3)[1].table().caption is None
