import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import matfact
from matfact import compare
from matfact.cli import app
from matfact.compare import Comparison, compare_projections, cut_matrices, load_weights


@pytest.fixture
def weights(tmp_path):
    rng = np.random.RandomState(0)
    path = tmp_path / "weights.npz"
    np.savez(path, **{f"layer.{i}": rng.standard_normal((24, 32)) for i in range(3)})
    return path


@pytest.fixture
def invoke(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["compare", *map(str, arguments)])

    return run


COMMON = ("--sizes", "8,16", "--per-size", "2", "--jobs", "1", "--methods", "lowrank,magnitude")


def test_results_are_those_of_python(weights, invoke, tmp_path):
    out = tmp_path / "new" / "folder"
    result = invoke(
        weights, *COMMON, "--full", "--density", "0.5,0.25", "--seed", 4, "--output", out
    )
    assert result.exit_code == 0, result.output
    written = Comparison.from_json(out / "comparison.json")
    matrices = cut_matrices(
        load_weights(weights), sizes=[8, 16], per_size=2, full=True, random_state=4
    )
    expected = compare_projections(
        matrices, ["lowrank", "magnitude"], densities=[0.5, 0.25], random_state=4
    )
    key = ("matrix", "method", "requested_density", "nnz", "relative_error", "normalized_error")
    for ours, theirs in zip(written, expected, strict=True):
        assert [getattr(ours, k) for k in key] == [getattr(theirs, k) for k in key]
    assert {row.size for row in written} == {"8", "16", "24×32"}
    assert written.metadata["weights"] == str(weights)
    assert written.metadata["random_state"] == 4
    assert written.metadata["cut"]["sizes"] == [8, 16]
    with (out / "comparison.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(expected)
    assert json.loads((out / "comparison.json").read_text())["summary"]


def test_layers_that_are_not_compared_are_named(weights, invoke, tmp_path):
    result = invoke(weights, "--sizes", 8, "--per-size", 1, "--methods", "magnitude", "--output",
                    tmp_path)  # fmt: skip
    left_out = Comparison.from_json(tmp_path / "comparison.json").metadata["left_out"]
    assert len(left_out) == 2
    for name, reason in left_out.items():
        assert name in result.output
        assert reason in result.output


def test_table_and_files_are_shown(weights, invoke, tmp_path):
    pytest.importorskip("matplotlib")
    result = invoke(weights, *COMMON, "--output", tmp_path / "out")
    for text in ("lowrank", "magnitude", "normalized", "comparison.csv", "comparison.png"):
        assert text in result.output
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_without_matplotlib_the_rest_is_written(weights, invoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke(weights, *COMMON, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "No figure" in result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "comparison.csv", "comparison.html", "comparison.json",
    ]  # fmt: skip


def test_failed_fits_are_listed_and_others_kept(weights, invoke, tmp_path):
    result = invoke(weights, *COMMON, "--density", "0.1", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "Failed: lowrank at size 8 (2×): density=0.1" in result.output
    rows = Comparison.from_json(tmp_path / "out" / "comparison.json")
    assert {row.status for row in rows if row.method == "magnitude"} == {"ok"}


def test_a_study_without_any_success_fails(weights, invoke, tmp_path):
    options = ("--sizes", "8", "--methods", "lowrank", "--density", "0.1", "--jobs", "1")
    assert invoke(weights, *options, "--output", tmp_path / "out").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "8,x"], "sizes must be whole numbers separated by commas, got '8,x'"),
        (["--sizes", "99"], "sizes must not exceed 24"),
        (["--density", "none"], "density must be numbers separated by commas, got 'none'"),
        (["--density", "1.5"], "density must be"),
        (["--density", "0"], "density must be"),
        (["--methods", "nonsense"], "methods must hold names among"),
        (["--methods", ""], "methods must hold names among"),
        (["--layers", "absent"], "layers must match"),
        (["--jobs", "0"], "n_jobs"),
        (["--per-size", "0"], "per-size"),
        (["--seed", "-1"], "seed"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_options_that_cannot_be_used_are_told_without_a_traceback(
    weights, invoke, tmp_path, arguments, message
):
    out = tmp_path / "out"
    result = invoke(weights, *COMMON, "--output", out, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)
    assert not out.exists() or not list(out.iterdir())


def test_missing_and_damaged_weights_are_told_without_a_traceback(invoke, tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    for name in ("absent.npz", "damaged.npz"):
        result = invoke(tmp_path / name, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert name in result.output
        assert isinstance(result.exception, SystemExit)


def test_an_output_that_is_a_file_is_refused(weights, invoke):
    result = invoke(weights, *COMMON, "--output", weights)
    assert result.exit_code == 2
    assert "output" in result.output


def test_ctrl_c_leaves_earlier_results(weights, invoke, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert invoke(weights, *COMMON, "--output", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare_projections", interrupted)
    result = invoke(weights, *COMMON, "--seed", 1, "--output", out)
    assert result.exit_code == 130
    assert "Stopped" in result.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_version_is_printed():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"matfact {matfact.__version__}\n")


def test_help_loads_no_numerical_library():
    code = (
        "import sys; from typer.testing import CliRunner; from matfact.cli import app; "
        "assert 'Compare' in CliRunner().invoke(app, ['compare', '--help']).output; "
        "print(*{'numpy', 'sklearn', 'numba', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_public_names_are_found_without_naming_their_module():
    assert matfact.compare_projections is compare_projections
    assert set(matfact.__all__) <= set(dir(matfact))
    for name in matfact.__all__:
        assert getattr(matfact, name).__name__.rpartition(".")[2] == name  # modules too
    with pytest.raises(AttributeError, match="nonsense"):
        matfact.nonsense  # noqa: B018
