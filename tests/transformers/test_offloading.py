"""Networks whose tensors accelerate keeps on the host or on a disk."""

import copy

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")

from matfact.torch import (  # noqa: E402
    add_adapters,
    balance_factors,
    compress,
    fine_tune,
    load_network,
    prune_neurons,
    randomize_supports,
    save_network,
)
from matfact.torch.layers.conv import FactorizedConv  # noqa: E402
from matfact.torch.layers.linear import FactorizedLinear  # noqa: E402
from tests.transformers.networks import NAMES, compressed, dense, inputs, logits  # noqa: E402

HOST = torch.device("cpu")


def to_host(model, folder):
    return accelerate.cpu_offload(model, HOST)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, HOST)


def with_buffers(model, folder):
    return accelerate.disk_offload(model, folder, HOST, offload_buffers=True)


def half_of_it(model, folder):
    """Offload what is over a limit, which may end within a factorized layer."""
    limit = int(0.7 * model.get_memory_footprint())
    places = accelerate.infer_auto_device_map(model, {"cpu": limit})
    assert {*places.values()} == {"cpu", "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = [to_host, to_disk, with_buffers, half_of_it]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offloaded", WAYS)
def test_compressed_networks_run(name, offloaded, tmp_path):
    model, batch = compressed(name), inputs(name)
    expected = logits(model, batch)
    model = offloaded(model, tmp_path)
    absent = [n for n, p in model.named_parameters() if p.is_meta and "factors" in n]
    assert absent
    for _ in range(2):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert all(model.get_parameter(name).is_meta for name in absent)  # and stay where they are


LATER = [pytest.param(name, True, marks=pytest.mark.slow) for name in NAMES if name != "qwen3"]


@pytest.mark.parametrize(
    ("name", "calibrated"), [*((name, False) for name in NAMES), ("qwen3", True), *LATER]
)
def test_offloaded_networks_are_compressed_to_the_same_values(name, calibrated, tmp_path):
    batches = [inputs(name, seed) for seed in range(3)] if calibrated else None
    settings = {"density": 0.5, "calibration": batches}
    expected, report = compress(dense(name), "magnitude", **settings)
    model = to_disk(dense(name), tmp_path)
    small, rows = compress(model, "magnitude", **settings)
    assert [row.status for row in rows] == [row.status for row in report]  # ties are known too
    assert any(parameter.is_meta for parameter in small.parameters())
    layers = [m for m in small.modules() if isinstance(m, (FactorizedLinear, FactorizedConv))]
    assert layers
    assert not any(parameter.is_meta for layer in layers for parameter in layer.parameters())
    batch = inputs(name, 7)
    assert torch.equal(logits(small, batch), logits(expected, batch))
    assert torch.equal(logits(model, batch), logits(dense(name), batch))  # the original is whole


def test_offloaded_networks_are_compressed_in_place(tmp_path):
    expected, _ = compress(dense("gpt2"), "magnitude", density=0.5)
    model = to_host(dense("gpt2"), tmp_path)
    compress(model, "magnitude", density=0.5, inplace=True)
    batch = inputs("gpt2")
    assert torch.equal(logits(model, batch), logits(expected, batch))


def test_copies_share_what_is_offloaded(tmp_path):
    model = to_host(dense("gpt2"), tmp_path)
    small, _ = compress(model, "magnitude", density=0.5, layers="c_fc")
    maps = [m.get_submodule("transformer.wte")._hf_hook.weights_map for m in (model, small)]
    assert maps[0] is maps[1]


def test_offloaded_networks_are_saved(tmp_path):
    expected = compressed("bert")
    save_network(to_disk(copy.deepcopy(expected), tmp_path / "offloaded"), tmp_path / "saved")
    loaded = load_network(dense("bert"), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, inputs("bert")), logits(expected, inputs("bert")))


def test_networks_that_were_never_loaded_are_refused(tmp_path):
    model = dense("gpt2").to("meta")
    with pytest.raises(ValueError, match="never loaded"):
        compress(model, "magnitude", density=0.5)
    with pytest.raises(ValueError, match="never loaded"):
        save_network(compressed("gpt2").to("meta"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("change", [
    lambda model, batches: add_adapters(model, 2),
    lambda model, batches: balance_factors(model),
    lambda model, batches: fine_tune(model, batches, lambda out, _: out.logits.square().mean()),
    lambda model, batches: prune_neurons(model, batches, 0.5),
    lambda model, batches: randomize_supports(model),
], ids=["adapters", "balance", "fine-tune", "neurons", "supports"])  # fmt: skip
def test_changes_that_would_be_lost_are_refused(change, tmp_path):
    model = to_disk(compressed("bert", coded=False), tmp_path)
    with pytest.raises(ValueError, match="accelerate has offloaded"):
        change(model, [inputs("bert", seed) for seed in range(3)])
