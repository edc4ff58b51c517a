"""Progress bars: where they are shown, the time they foretell, and that they change nothing."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from matfact import LowRank, MagnitudePruner, compare_projections
from matfact._progress import Bar, Forecast, Step
from matfact.checkpoint import compress as compress_file
from matfact.torch import Budget, compress, fine_tune
from matfact.torch.neurons import prune_neurons

TWICE = """
import torch
from torch import nn
from matfact import LowRank
from matfact.torch import compress
class Failing(LowRank):
    def _factorize(self, W, history):
        if W.shape[0] == 7:
            raise KeyboardInterrupt
        return super()._factorize(W, history)
for method, width in (("lowrank", 16), (Failing(), 7)):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, width))
    print(len(compress(model, method, progress=True).report), "layers")
"""


def in_terminal(program):
    """Return what a program writes to a terminal, and to its standard output elsewhere."""
    pty = pytest.importorskip("pty")
    here, there = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", program], stderr=there, stdout=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(there)
    shown = b""
    while True:
        try:
            piece = os.read(here, 4096)
        except OSError:  # how Linux tells the end
            break
        if not piece:
            break
        shown += piece
    out = run.communicate(timeout=60)[0]
    os.close(here)
    return shown.decode(), out.decode()


def test_a_bar_is_shown_in_the_terminal_alone_which_is_sane_after_an_interruption():
    shown, out = in_terminal(TWICE)
    assert "2/2" in shown
    assert "left" in shown
    assert "error 0." in shown
    assert out == "2 layers\n"
    assert "KeyboardInterrupt" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2  # cursor hidden, and back


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_nothing_is_written_without_a_terminal_and_nothing_changes(capfd, tmp_path):
    x, budget = torch.randn(32, 8), Budget(0.8, densities=(0.3, 0.6))
    given = {"method": ["lowrank", "magnitude"], "budget": budget, "calibration": [x, x + 1]}
    plain, told = (compress(network(), progress=on, **given) for on in (False, True))
    assert torch.equal(plain.model(x), told.model(x))
    W = {"w": np.random.RandomState(0).randn(8, 8)}
    fits = [compare_projections(W, ["lowrank"], progress=on)[0] for on in (False, True)]
    assert fits[0].relative_error == fits[1].relative_error
    pruned = [prune_neurons(network(), [x], 8, progress=on).model(x) for on in (False, True)]
    assert torch.equal(*pruned)
    fine_tune(network(), [(x, torch.zeros(32, 4))], lambda y, _: y.square().mean(), progress=True)
    weights = pytest.importorskip("safetensors.torch")
    weights.save_file({"a.weight": torch.randn(16, 16)}, tmp_path / "w.safetensors")
    compress_file(tmp_path / "w.safetensors", tmp_path / "out", LowRank(), progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [1, "yes", []])
def test_other_values_are_refused_before_any_work(progress):
    with pytest.raises(ValueError, match=r"progress must be True, False or a function, got"):
        compress(network(), "lowrank", progress=progress)


def test_time_left_is_told_from_work_and_not_from_the_number_of_layers():
    forecast = Forecast()
    forecast.expect([("svd", 1.0), ("svd", 99.0)])
    assert forecast.left(0.0) is None
    forecast.done(Step("a", "svd", 1.0, seconds=2.0), now=10.0)  # calibration took 8 s before
    assert forecast.left(10.0) == pytest.approx(198.0)


def test_each_method_has_a_rate_of_its_own():
    forecast = Forecast()
    forecast.expect([("slow", 1.0), ("fast", 1.0), ("slow", 1.0), ("fast", 2.0), ("new", 1.0)])
    forecast.done(Step("a", "slow", 1.0, seconds=9.0), now=9.0)
    assert forecast.left(9.0) is None  # most of the work is of methods not seen yet
    forecast.done(Step("b", "fast", 1.0, seconds=1.0), now=10.0)
    assert forecast.left(10.0) == pytest.approx(9.0 + 2.0 + 5.0)


def test_what_the_first_fit_does_besides_is_not_expected_again():
    forecast = Forecast()
    forecast.expect([("svd", 1.0)] * 12)
    forecast.done(Step("a", "svd", 1.0, seconds=20.0), now=20.0)  # compiles kernels
    forecast.done(Step("b", "svd", 1.0, seconds=1.0), now=21.0)
    assert forecast.left(21.0) == pytest.approx(10.0)


def test_steps_of_unknown_times_are_counted_from_the_end_of_the_first():
    forecast = Forecast()
    forecast.expect([("", 2.0)] * 10)
    forecast.done(Step("a", work=2.0), now=50.0)
    assert forecast.left(50.0) is None
    forecast.done(Step("b", work=2.0), now=53.0)
    assert forecast.left(53.0) == pytest.approx(24.0)


def test_parallel_fits_take_less_time():
    forecast = Forecast()
    forecast.expect([("svd", 1.0)] * 4)
    forecast.done(Step("a", "svd", 1.0, seconds=4.0), now=4.0)
    forecast.done(Step("b", "svd", 1.0, seconds=4.0), now=4.0)
    assert forecast.left(4.0) == pytest.approx(4.0)


def test_work_grows_as_fits_do():
    assert LowRank().fit_work(20, 10) == 2 * LowRank().fit_work(10, 10)
    assert LowRank().fit_work(20, 20) == 8 * LowRank().fit_work(10, 10)
    assert MagnitudePruner().fit_work(20, 20) == 4 * MagnitudePruner().fit_work(10, 10)
    calibrated = MagnitudePruner().fit_work(20, 10, with_inputs=True)
    assert calibrated == MagnitudePruner().fit_work(10, 10, with_inputs=True) * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("n_writes", [0, 2])
def test_a_terminal_that_has_gone_does_not_cost_the_result(n_writes, monkeypatch):
    class Gone(io.StringIO):
        left = n_writes

        def isatty(self):
            return True

        def write(self, text):
            self.left -= 1
            if self.left < 0:
                raise OSError("hung up")
            return len(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Gone())
    report = compress(network(), "lowrank", progress=True).report
    assert [row.status for row in report] == ["compressed"] * 2


def test_in_a_notebook_one_display_is_kept_up_to_date(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content)

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(display, "display", lambda content, display_id: Handle())
    with Bar(True) as bar:
        bar.expect([("", 1.0)], 1)
        bar.advance(Step("blocks.0.attention"))
    assert "blocks.0.attention" in shown[-1]._repr_mimebundle_([], [])["text/plain"]
