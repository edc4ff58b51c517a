"""The benchmark of a GPU: what it does without one, and what it says of wrong results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

# The benchmarks are not installed with the library.
from benchmarks import __main__ as main  # noqa: E402
from benchmarks import gpu  # noqa: E402
from benchmarks.gpu import page, steps  # noqa: E402
from benchmarks.gpu.device import Device  # noqa: E402

ROOT = Path(__file__).parents[2]
GOOD = {"structure": "signs", "road": "tiles", "dtype": "float16", "size": (3, 4), "limit": 1e-3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--output", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("No benchmark: torch finds no GPU.")
    assert not (tmp_path / "results").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Rehearse given steps; return the status and the page."""

    def rehearse(minutes=1.0, **given):
        monkeypatch.setattr(steps, "STEPS", given)
        options = {"threads": 1, "rehearse": True, "minutes": minutes, "output": tmp_path}
        status = gpu.run(type("Options", (), options))
        return status, (tmp_path / "gpu.md").read_text()

    return rehearse


def test_the_least_exact_result_of_each_kernel_is_shown(run):
    status, text = run(kernels=lambda device: [GOOD | {"error": e} for e in (1e-4, 4e-4, 2e-4)])
    assert status == 0
    assert "3 results compared, 0 wrong." in text
    assert "| signs | tiles | float16 | 3×4 | 0.0004 | 0.001 |" in text
    assert "0.0002" not in text


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_wrong_results_are_failures(run, error):
    status, text = run(kernels=lambda device: [GOOD | {"error": error}])
    assert status == 1
    assert "1 results compared, 1 wrong." in text
    assert "WRONG kernels: structure signs" in text


def test_steps_that_fail_keep_what_was_measured_and_do_not_stop_others(run):
    def failing(device):
        yield GOOD | {"error": 1e-4}
        raise RuntimeError("out of memory")

    status, text = run(
        kernels=failing, network=lambda device: [{"structure": "x", "seconds": 1e-6}]
    )
    assert status == 1
    assert "1 results compared" in text
    assert "- kernels: RuntimeError: out of memory" in text
    assert "| x | 1 |" in text


def test_nothing_is_started_after_the_time_is_over(run):
    def later(device):
        raise AssertionError

    status, text = run(0, kernels=lambda device: [GOOD | {"error": 1e-4}] * 2, network=later)
    assert status == 0
    assert "1 results compared" in text
    assert "stopped after 0 minutes" in text


def test_lines_for_the_terminal():
    row = {"step": "layers", "structure": "Monarch", "batch": 16, "seconds": 2e-5}
    assert page.line(row) == "layers: structure Monarch, batch 16, µs 20"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "argument --minutes: must be above 0, got 0"),
        (["--minutes=-1"], "argument --minutes: must be above 0, got -1"),
        (["--minutes", "nan"], "argument --minutes: must be above 0, got nan"),
        (["--threads", "0"], "argument --threads: must be an integer of at least 1, got 0"),
        (["--output", "FILE"], "argument --output: must name a folder, but FILE is a file"),
        (["--output", "FILE/in/it"], "argument --output: must name a folder, but FILE is a file"),
    ],
)
def test_options_that_no_run_can_take_are_refused_in_a_sentence(
    tmp_path, capsys, monkeypatch, options, message
):
    file = tmp_path / "results"
    file.write_text("kept")
    options = [option.replace("FILE", str(file)) for option in options]
    for variable in main.THREAD_VARIABLES:  # which it sets
        monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit, match="2"):
        main.main(["gpu", "--rehearse", *options])
    assert message.replace("FILE", str(file)) in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_results_are_replaced_as_a_whole(run, tmp_path):
    run(kernels=lambda device: [GOOD | {"error": 1e-4}])
    kept = {name: (tmp_path / name).open() for name in ("gpu.json", "gpu.md")}
    run(kernels=lambda device: [GOOD | {"error": 1e-4}] * 2)
    assert len(json.load(kept["gpu.json"])["rows"]) == 1  # what a reader opened stays whole
    assert "1 results compared" in kept["gpu.md"].read()
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 2
    for file in kept.values():
        file.close()


def test_what_only_networks_need_may_be_missing():
    code = """
import sys
sys.modules["matplotlib"] = None  # as if it were not installed
from benchmarks.gpu import steps
from benchmarks.gpu.device import Device
for row in steps._from_package(Device(True), "encoder", [(1, 4)]):
    print(row["failure"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("encoder is left out:")
    assert "matplotlib" in done.stdout


def test_networks_of_other_packages_are_timed_dense_and_compressed():
    pytest.importorskip("transformers")
    rows = list(steps._from_package(Device(True), "tiny", [(1, 4)]))
    assert [row["structure"] for row in rows] == ["tiny, dense", "tiny, Monarch"]
    assert [row["batch"] for row in rows] == [4, 4]
    assert all(row["seconds"] > 0 for row in rows)


def test_the_page_says_which_weights_networks_have(run):
    kinds = {"stack": "random", "e": "pretrained"}
    rows = [{"structure": name, "weights": kind} for name, kind in kinds.items()]
    status, text = run(network=lambda device: rows)
    assert status == 0
    assert "| stack | random |" in text
    assert "| e | pretrained |" in text
