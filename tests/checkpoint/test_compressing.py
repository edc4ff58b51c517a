"""Conversion of safetensors files to checkpoints: selection, resuming and errors."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import matfact
from matfact import DoubleSparseFactorizer, LowRank, MagnitudePruner, Palm4MSA, metrics
from matfact.checkpoint import Checkpoint, _source, compress, decompress
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._base import Factorization
from matfact.operators import QuantizedFactor, SparseFactor
from matfact.operators._grid import fit_grid
from matfact.operators._quantized import group_bounds

HALF = MagnitudePruner(density=0.5)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "embed_tokens.weight": random(50, 16),
        "layers.0.fc.weight": random(48, 32),
        "layers.0.fc.bias": random(48),
        "layers.1.fc.weight": random(32, 48, dtype=torch.bfloat16),
        "layers.2.conv.weight": random(16, 8, 3, 3, dtype=torch.float16),
        "layers.3.fc.weight": random(20, 20, dtype=torch.float64),
        "steps": torch.arange(3),
        "tiny.weight": random(1, 2),
    }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layers_are_factorized_and_the_rest_is_copied(source, tmp_path):
    network = compress(source, tmp_path / "out", HALF)
    factorized = {name for name, tensor in network.tensors.items() if tensor.is_product}
    assert factorized == {
        name for name in tensors() if name.startswith("layers") and "bias" not in name
    }
    assert network.tensors["tiny.weight"].note == "its factors would take more bytes"
    assert all(tensor.is_product != bool(tensor.note) for tensor in network.tensors.values())
    decompress(tmp_path / "out", tmp_path / "dense.safetensors")
    before, after = tensors(), load_file(tmp_path / "dense.safetensors")
    assert set(before) == set(after)
    for name, tensor in network.tensors.items():
        W, W_hat = before[name], after[name]
        assert (W.dtype, W.shape) == (W_hat.dtype, W_hat.shape)
        if not tensor.is_product:
            assert torch.equal(W, W_hat)
            continue
        # Each value kept is kept exactly, whatever its dtype.
        assert bool(((W_hat == W) | (W_hat == 0)).all())
        assert tensor.density == int((W_hat != 0).sum()) / W.numel() <= 0.5
        matrices = (A.double().reshape(len(W), -1).numpy() for A in (W, W_hat))
        np.testing.assert_allclose(
            tensor.relative_error, metrics.relative_error(*matrices), rtol=1e-5
        )


def test_products_of_16_bit_weights_are_stored_in_16_bits(source, tmp_path):
    network = compress(source, tmp_path / "out", LowRank(density=0.5), layers="[12]")
    for name, dtype in (("layers.1.fc.weight", "BF16"), ("layers.2.conv.weight", "F16")):
        specs = network.file(name).specs
        assert {specs["0.values"].dtype, specs["1.values"].dtype} == {dtype}
        W = tensors()[name].float().reshape(network[name].shape).numpy()
        stored = metrics.relative_error(W, network[name].astype(np.float32).toarray())
        np.testing.assert_allclose(network.tensors[name].relative_error, stored, rtol=1e-5)


def test_a_pattern_chooses_the_layers(source, tmp_path):
    network = compress(source, tmp_path / "out", HALF, layers=r"embed|\.3\.")
    factorized = {name for name, tensor in network.tensors.items() if tensor.is_product}
    assert factorized == {"embed_tokens.weight", "layers.3.fc.weight"}
    assert network.tensors["layers.0.fc.weight"].note == "not requested"


def test_what_is_asked_for_and_is_no_weight_is_named(source, tmp_path):
    save_file(tensors() | {"attn.bias": torch.ones(9, 9), "fc.scale": torch.ones(3)}, source)
    network = compress(source, tmp_path / "out", HALF, layers="attn|scale|steps|3.fc")
    assert network.tensors["layers.3.fc.weight"].is_product
    assert (
        "requested, but not in a linear layer or convolution" in network.tensors["attn.bias"].note
    )
    assert "asked" not in network.tensors["fc.scale"].note + network.tensors["steps"].note
    with pytest.raises(ValueError, match=r"no weight. attn.bias: requested, but .* are 5: "):
        compress(source, tmp_path / "none", HALF, layers="attn")


def test_complex_weights_are_kept_by_methods_that_cannot_take_them(tmp_path):
    W = torch.randn(32, 32, dtype=torch.complex64)
    save_file({"fc.weight": W, "up.weight": torch.randn(32, 32)}, tmp_path / "m.safetensors")
    network = compress(tmp_path / "m.safetensors", tmp_path / "out", HALF)
    assert "Complex" in network.tensors["fc.weight"].note
    np.testing.assert_array_equal(network["fc.weight"], W.numpy())


def test_a_layer_that_cannot_be_factorized_is_kept_with_the_reason(tmp_path):
    weights = {"bad.weight": torch.full((32, 32), torch.nan), "good.weight": torch.randn(32, 32)}
    save_file(weights, tmp_path / "m.safetensors")
    network = compress(tmp_path / "m.safetensors", tmp_path / "out", HALF)
    assert "not finite" in network.tensors["bad.weight"].note
    assert np.isnan(network["bad.weight"]).all()
    assert network.tensors["good.weight"].is_product


def test_a_damaged_source_leaves_nothing(source, tmp_path):
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ValueError, match="path must name"):
        compress(source, tmp_path / "out", HALF)
    with pytest.raises(FileNotFoundError, match="path must name"):
        compress(tmp_path / "missing", tmp_path / "out", HALF)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "("}, "regular expression"),
        ({"layers": "nothing like it"}, "names no weight"),
        ({"factorizer": MagnitudePruner(density=2)}, "density"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress(source, tmp_path / "out", **({"factorizer": HALF} | options))
    assert not (tmp_path / "out").exists()


def test_the_result_does_not_depend_on_the_number_of_jobs(source, tmp_path):
    random = Palm4MSA(density=0.5, max_iter=3)
    for jobs in (1, 2):
        compress(source, tmp_path / f"out{jobs}", random, n_jobs=jobs)
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_run_is_taken_up_and_gives_the_same_bytes(kills, source, tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, script, source, tmp_path / "runs", str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    trials = report["trials"]
    assert len(trials) == report["calls"] + kills
    assert all(trial["identical"] for trial in trials), trials
    assert all(trial["kept"] for trial in trials), trials
    assert not any(trial["left"] for trial in trials), trials
    assert {trial["finished"] for trial in trials} >= {0, 1, 3, 6}


class Counted(BaseFactorizer):
    """Prune, and count the fits."""

    fits = 0

    def _factorize(self, W, history):
        Counted.fits += 1
        return HALF._factorize(W, history)


def stopped_after(n_shards):
    """Return a progress that stops the work."""
    seen = []

    def progress(shard, total):
        seen.append(shard)
        if len(seen) == n_shards:
            raise KeyboardInterrupt

    return progress


def test_finished_layers_are_not_fitted_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "fits", 0)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", Counted(), progress=stopped_after(3))
    assert Counted.fits == 2  # the first file holds what is not factorized
    seen = []
    compress(source, tmp_path / "out", Counted(), progress=lambda shard, total: seen.append(total))
    assert Counted.fits == 5
    assert seen == [6] * 6
    before = content(tmp_path / "out")
    compress(source, tmp_path / "out", Counted())  # all is done
    assert Counted.fits == 5
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["cut", "changed", "removed", "torn record"])
def test_a_file_damaged_since_is_made_again(damage, source, tmp_path):
    compress(source, tmp_path / "whole", HALF)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(source, out, HALF, progress=stopped_after(3))
    victim = sorted(path for path in out.iterdir() if path.suffix == ".safetensors")[-1]
    bytes_before = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(bytes_before[:-1])
    elif damage == "changed":
        victim.write_bytes(bytes_before[:-1] + bytes([bytes_before[-1] ^ 1]))
    elif damage == "removed":
        victim.unlink()
    else:
        record = (out / "journal.log").read_bytes()
        (out / "journal.log").write_bytes(record[:-10])
    (out / ".00003.safetensors.matfact-0123456789abcdef.part").write_bytes(
        b"left by a process that was killed"
    )
    compress(source, out, HALF)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("is_complete", [True, False])
def test_other_options_or_weights_are_refused(is_complete, source, tmp_path):
    out = tmp_path / "out"
    if is_complete:
        compress(source, out, HALF)
    else:
        with pytest.raises(KeyboardInterrupt):
            compress(source, out, HALF, progress=stopped_after(2))
    before = content(out)
    for factorizer, options, changed in (
        (MagnitudePruner(density=0.4), {}, "density"),
        (LowRank(density=0.5), {}, "method"),
        (HALF, {"layers": "fc"}, "layers"),
    ):
        with pytest.raises(
            ValueError, match=f"begun with other options or weights: .*{changed} was"
        ):
            compress(source, out, factorizer, **options)
    save_file(tensors(seed=1), source, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights: other model\.safetensors"):
        compress(source, out, HALF)
    assert content(out) == before


def test_a_folder_with_anything_else_is_left_alone(source, tmp_path, monkeypatch):
    # Refused before the weights are hashed, which may take minutes.
    monkeypatch.setattr(_source.Source, "digests", lambda self: pytest.fail("hashed"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="new or empty folder"):
        compress(source, tmp_path / "out", HALF)
    assert content(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_a_record_without_its_first_line_is_refused(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", HALF, progress=stopped_after(2))
    journal = tmp_path / "out" / "journal.log"
    journal.write_bytes(b"0" + journal.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"with an intact journal\.log"):
        compress(source, tmp_path / "out", HALF)


def test_two_processes_do_not_write_into_one_folder(source, tmp_path):
    pytest.importorskip("fcntl")
    refused = []

    def second(shard, total):
        with pytest.raises(ValueError, match="another process"):
            compress(source, tmp_path / "out", HALF)
        refused.append(shard)

    compress(source, tmp_path / "out", HALF, progress=second)
    assert len(refused) == 6


def test_memory_is_bounded_by_the_largest_layer(tmp_path):
    side = 512
    layer = 4 * side**2
    weights = {f"{i}.weight": torch.randn(side, side) for i in range(12)}
    weights["embedding"] = torch.zeros(16 * side, side)  # copied in pieces
    save_file(weights, tmp_path / "m.safetensors")
    del weights
    # Numba compiles in the memory that is measured.
    compress(tmp_path / "m.safetensors", tmp_path / "warm", HALF, layers=r"^0\.")
    decompress(tmp_path / "warm", tmp_path / "dense.safetensors")
    tracemalloc.start()
    try:
        compress(tmp_path / "m.safetensors", tmp_path / "out", HALF)
        compressed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        decompress(tmp_path / "out", tmp_path / "dense.safetensors")
        decompressed = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Pieces of 4 MiB are what the copying takes; the fit takes a few times its layer.
    assert compressed < 12 * layer
    assert decompressed < 12 * layer


def test_many_layers_take_no_more_memory_than_the_largest(tmp_path):
    def peak(name, sides):
        weights = {f"{i}.weight": torch.randn(side, side) for i, side in enumerate(sides)}
        save_file(weights, tmp_path / f"{name}.safetensors")
        del weights
        tracemalloc.start()
        try:
            compress(tmp_path / f"{name}.safetensors", tmp_path / name, factorizer)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    torch.manual_seed(0)
    factorizer = DoubleSparseFactorizer(density=0.25, max_iter=10)
    peak("warm", [96])  # compiles
    single, many = peak("single", [192]), peak("many", [192, 64, 128, 192, 192, 96, 160, 192])
    assert many < single + 0.5 * 4 * 192**2


def test_the_header_is_not_read_for_every_layer(tmp_path, monkeypatch):
    weights = {f"{i}.weight": torch.randn(8, 8) for i in range(20)} | {"bias": torch.ones(3)}
    save_file(weights, tmp_path / "m.safetensors")
    read, begin = [], _source.SafetensorsFile.__init__

    def counted(self, path, *arguments):
        read.append(Path(path).name)
        begin(self, path, *arguments)

    monkeypatch.setattr(_source.SafetensorsFile, "__init__", counted)
    compress(tmp_path / "m.safetensors", tmp_path / "out", HALF)
    assert read.count("m.safetensors") == 1


def test_settings_are_remembered(source, tmp_path):
    compress(source, tmp_path / "out", HALF, layers="fc")
    settings = Checkpoint(tmp_path / "out").settings
    assert settings["method"] == "MagnitudePruner"
    assert settings["parameters"] == {"density": 0.5, "constraint": "global_sparsity"}
    assert settings["layers"] == "fc"
    assert list(settings["source"]) == ["model.safetensors"]
    assert matfact.__version__ in settings["generator"]


class Quantizer(BaseFactorizer):
    """The larger half of the entries, in codes of 4 bits."""

    def _factorize(self, W, history):
        pattern = SparseFactor.from_dense(W, abs(W) >= np.median(abs(W)))
        bounds = group_bounds(pattern, 64)
        grid = fit_grid(pattern.values, bounds, 4)
        values = grid.nearest(pattern.values, bounds)
        quantized = QuantizedFactor(values, grid.scales.astype(W.dtype), 4, 64, pattern)
        return Factorization([quantized])


def test_quantized_layers_are_compressed_to_their_bits_and_back(source, tmp_path):
    network = compress(source, tmp_path / "out", Quantizer(), layers="fc.weight|conv")
    decompress(tmp_path / "out", tmp_path / "dense.safetensors")
    before, after = tensors(), load_file(tmp_path / "dense.safetensors")
    layers = [name for name in network.tensors if name.startswith("layers") and "bias" not in name]
    for name in layers:
        tensor = network.tensors[name]
        assert tensor.storage == ("bitmask, 4 bits",)
        assert after[name].dtype == before[name].dtype
        W, W_hat = (each[name].double().reshape(len(each[name]), -1) for each in (before, after))
        rounding = torch.finfo(before[name].dtype).eps
        error = metrics.relative_error(W.numpy(), W_hat.numpy())
        assert error == pytest.approx(tensor.relative_error, abs=rounding)
        assert error < 0.4
        (factor,) = network.product(name)
        file = network.file(name)
        assert file.specs["0.scales"].dtype == "F16"
        held = sum(spec.nbytes for spec in file.specs.values())
        assert held <= W.numel() * (0.5 * 4 + 1) / 8 + 16 + 2 * len(factor.scales) + 8
        assert rf"\"dtype\":\"{tensor.spec.dtype}\"".encode() in file.path.read_bytes()
