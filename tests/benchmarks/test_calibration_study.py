"""The study of calibration measures what it says, on fresh inputs."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from benchmarks import harness  # noqa: E402

# The benchmarks are not installed with the library.
from benchmarks.networks import calibration, fresh, masked  # noqa: E402
from benchmarks.networks.subjects import Seen, Subject  # noqa: E402


def subject(model, batches, key="x"):
    def seen(network, batch):
        output = network(batch[key] if isinstance(batch, dict) else batch)
        return Seen(output.flatten(0, -2), output.flatten(0, -2))

    return Subject(model.eval(), None, batches[0], lambda batch: batch, batches, seen)


def changed(model, **weights):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, factor in weights.items():
            other.get_submodule(name).weight.mul_(factor)
    return other


def test_what_is_lost_counts_whole_and_what_should_be_without_its_mean():
    torch.manual_seed(0)
    wanted, lost = torch.randn(50, 4) + 5, torch.randn(50, 4) + 0.5
    for centered, energy in ((True, wanted - wanted.mean(0)), (False, wanted)):
        loss = fresh.Loss(centered)
        for part, change in zip(wanted.split(20), lost.split(20), strict=True):
            loss.add(part, part + change)
        assert loss.relative() == pytest.approx(float(lost.norm() / energy.norm()), rel=1e-5)


def test_errors_of_layers_are_paired_with_the_dense_network_or_with_the_dense_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False))
    small = changed(model, **{"0": 0.5})
    whole = subject(model, [torch.randn(8, 6) for _ in range(3)])
    outputs, parts, paired = fresh.measure(whole, small, ["0", "1"], paired=True)
    assert paired == pytest.approx({"0": 0.5, "1": 0.5}, rel=1e-6)
    y = torch.cat([whole.seen(model, batch).state for batch in whole.fresh]).detach()
    right = 0.5 * float(y.norm() / (y - y.mean(0)).norm())
    assert outputs["output error"] == pytest.approx(right, rel=1e-5)
    assert len(parts) == 3
    _, _, alone = fresh.measure(whole, small, ["0", "1"], paired=False)
    assert alone == pytest.approx({"0": 0.5, "1": 0.0}, abs=1e-6)


def test_a_network_has_no_error_against_itself_whatever_it_draws():
    torch.manual_seed(0)
    model = masked.MaskedAutoencoder(8, 2, width=8, depth=1).eval()
    whole = Subject(
        model, None, None, lambda batch: batch, [torch.randn(5, 1, 8, 8) for _ in range(2)],
        lambda network, images: Seen(network(images)[0].flatten(0, 1)),
    )  # fmt: skip
    outputs, _, errors = fresh.measure(
        whole, copy.deepcopy(model), ["embed", "predict"], paired=True
    )
    assert [outputs["output error"], *errors.values()] == [0.0] * 3


def test_every_call_of_a_shared_layer_counts_and_padding_does_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    torch.manual_seed(0)
    model, mask = Twice(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": mask}
    small = changed(model, layer=1.1)
    _, _, errors = fresh.measure(subject(model, [batch]), small, ["layer"], paired=True)
    with torch.no_grad():
        first = model.layer(batch["x"])[mask.bool()]
        second = model.layer(first.relu())
    total = first.square().sum() + second.square().sum()
    lost = 0.1**2 * first.square().sum() + 0.21**2 * second.square().sum()
    assert errors["layer"] == pytest.approx(float((lost / total).sqrt()), rel=1e-5)


def test_cells_of_the_full_form_cover_the_table():
    rows = [harness.rows([{"cell": cell, "result": {"layers": {}}}])[0]
            for cell in calibration.cells(quick=False)]  # fmt: skip
    found = calibration.groups(rows)
    networks = {key[0] for key in found}
    assert len(networks) == 6
    assert set(found) == {(n, s, d) for n in networks for s in (16, 64, 256) for d in (0.5, 0.3)}
    assert all(len(by) == 4 for by in found.values())


def test_the_noise_of_a_ratio_is_told_from_batches():
    def row(method, parts):
        cell = {"network": "ResNet-20", "method": method}
        mean = sum(parts) / len(parts)
        result = {"divergence": mean, "parts": {str(i): part for i, part in enumerate(parts)}}
        return harness.rows([{"cell": cell, "result": result}])[0]

    rng = torch.Generator().manual_seed(0)
    base = 1 + 0.1 * torch.rand(20, generator=rng, dtype=torch.double)
    same = calibration.ratio({"DSF": row("DSF", (1.5 * base).tolist()),
                              "ADMM": row("ADMM", base.tolist()),
                              "other": row("other", (9 * base).tolist())})  # fmt: skip
    assert same == pytest.approx((1.5, 0.0), abs=1e-9)
    noise = torch.randn(20, generator=rng, dtype=torch.double)
    noisy = calibration.ratio({"DSF": row("DSF", (1 + 0.1 * noise).tolist()),
                               "ADMM": row("ADMM", [1.0] * 20)})  # fmt: skip
    assert noisy.error == pytest.approx(0.1 * float(noise.std()) / 20**0.5, rel=1e-6)


def test_the_quick_form_judges_three_networks(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFACT_CACHE", str(tmp_path / "checkpoints"))
    folder = tmp_path / "results"
    folder.mkdir()
    assert calibration.run(quick=True, folder=folder, cells="(autoencoder|shared)") == 0
    rows = harness.rows(harness.load(folder / "cells.jsonl").values())
    assert len(rows) == 8
    for row in rows:
        assert 0 < calibration.headline(row) < float("inf")
        if row["samples"]:
            ratios = calibration.layer_ratios(row)
            assert len(ratios) == row["compressed"].mean
            assert max(ratios) < float("inf")
    assert "of 2 cells" in (folder / "table.md").read_text()
