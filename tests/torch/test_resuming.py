"""Killed compressions are resumed from a folder, with the same result to the bit."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import UserDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact import DoubleSparseFactorizer  # noqa: E402
from matfact.checkpoint._journal import Journal  # noqa: E402
from matfact.constraints import FixedSupport  # noqa: E402
from matfact.torch import Budget, Calibration, compress, compress_gradually  # noqa: E402
from matfact.torch.calibration import sequential  # noqa: E402
from matfact.torch.calibration._layer_statistics import LayerStatistics  # noqa: E402
from matfact.torch.compression import _fits, budget  # noqa: E402

MODES = {
    "feedback": {},
    "no feedback": {"feedback": False},
    "matched": {"match_blocks": True},
    "not sequential": {"sequential": False},
    "no calibration": None,
}
N_LAYERS = 7


class Block(nn.Module):
    """Two layers with the same input, a third, and random numbers even in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(12), nn.Linear(16, 12)
        self.query, self.key = nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x):
        x = x + 0.1 * torch.rand_like(x)
        normed = self.norm(x)
        return x + self.down(torch.relu(self.query(normed)) * self.key(normed))


class Network(nn.Module):
    """Blocks, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(12, 12)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.head(x))


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 12, generator=generator) for _ in range(7)]


def small(folder, mode="feedback", model=None, method="magnitude", x=None, **options):
    given = MODES[mode]
    if given is not None:
        options["calibration"] = Calibration(x or batches(), **given)
    options = {"density": 0.4} | options
    return compress(model or Network(), method, resume_folder=folder, **options)


def content(result):
    """Return everything that is not a time, as text and bytes."""
    model, report = result
    tensors = {name: x.numpy().tobytes() for name, x in model.state_dict().items()}
    rows = [dataclasses.replace(row, seconds=None) for row in report]
    return tensors, rows, report.metadata


class StoppedError(Exception):
    pass


def stopping(count):
    """Return a function that raises after so many layers."""
    rows = []

    def tell(row, total):
        rows.append(row)
        if len(rows) == count:
            raise StoppedError

    return tell


@pytest.fixture
def fitted(monkeypatch):
    """Names of the functions that have fitted a layer."""
    calls = []
    for module in (_fits, budget):

        def fit(*args, module=module, own=module.fit_layer, **options):
            calls.append(module.__name__.rpartition(".")[2])
            return own(*args, **options)

        monkeypatch.setattr(module, "fit_layer", fit)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_what_was_finished_is_not_fitted_again(mode, tmp_path, fitted, monkeypatch):
    whole = content(small(None, mode))
    del fitted[:]
    with pytest.raises(StoppedError):
        small(tmp_path, mode, progress=stopping(4))
    assert len(fitted) == 4
    assert content(small(tmp_path, mode)) == whole
    assert len(fitted) == N_LAYERS
    monkeypatch.delattr(LayerStatistics, "add")  # no Gram matrix is needed
    assert content(small(tmp_path, mode)) == whole
    assert len(fitted) == N_LAYERS


def test_runs_that_are_killed_again_and_again_give_the_same_bits(tmp_path):
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, check=False,
        env=os.environ | dict.fromkeys(threads, "1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kills = {"matched": (N_LAYERS + 2) // 3, "no feedback": N_LAYERS // 3}
    assert found == {mode: [True, N_LAYERS, count] for mode, count in kills.items()}


def main(folder):
    """Kill runs again and again; print if the result is the same, fits and kills."""
    found = {}
    for mode in ("matched", "no feedback"):
        log, result = folder / f"{mode} log", folder / f"{mode} result"
        whole = repr(content(small(None, mode)))  # compiles for the children too
        kills = 0
        while in_child(result, folder / mode, mode, log):
            kills += 1
        found[mode] = [result.read_text() == whole, log.stat().st_size, kills]
    print(json.dumps(found))


def in_child(result, folder, mode, log):
    """Run in a process that dies with the third part that it finishes; return if it has died."""
    if (child := os.fork()) == 0:
        own, fit, turns = Journal.add, _fits.fit_layer, iter(range(3))

        def add(self, shard):
            own(self, shard)
            if next(turns) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(*args, **options):
            with log.open("ab") as file:
                file.write(b".")
            return fit(*args, **options)

        Journal.add, _fits.fit_layer = add, counted
        result.write_text(repr(content(small(folder, mode))))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize(
    "options",
    [
        {"value_bits": 3},
        {"method": "double_binary", "density": None},
        {"method": "butterfly", "density": None, "layers": "down"},
        {"method": "monarch"},
        {"method": "lowrank"},
        {"method": "dsf"},
        {"model": Network().double(), "x": [x.double() for x in batches()]},
        {"model": Network().bfloat16(), "x": [x.bfloat16() for x in batches()]},
    ],
    ids=lambda options: " ".join(options),
)
def test_all_factors_come_back_to_the_bit(options, tmp_path, fitted):
    whole = small(tmp_path, **options)
    del fitted[:]
    again = small(tmp_path, **options)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.report.rows == again.report.rows
    assert not fitted


def test_groups_complex_numbers_and_kept_layers_come_back(tmp_path, fitted):
    model = nn.Sequential(nn.Conv1d(6, 12, 3, groups=3), nn.Flatten(), nn.Linear(12 * 6, 9))
    model.extra = nn.Linear(8, 8, dtype=torch.complex64)
    model.tiny = nn.Linear(1, 1)
    layers = ["0", "2", "extra", "tiny"]
    options = {
        "method": "magnitude",
        "density": 0.4,
        "layers": layers,
        "overrides": {"extra": "monarch"},
    }
    runs = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append(compress(model, resume_folder=tmp_path, **options))
    assert len(fitted) == 4
    assert content(runs[0])[1:] == content(runs[1])[1:]
    assert [row.status for row in runs[1].report] == [*["compressed"] * 3, "kept"]
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cost", ["nbytes", "seconds"])
def test_trials_for_a_budget_are_not_run_again(cost, tmp_path, fitted, monkeypatch):
    noise = itertools.count(1)  # times are never measured alike
    monkeypatch.setattr(budget, "apply_seconds", lambda p: p.flops * (1 + next(noise) / 1000))
    limit = Budget(0.5, cost=cost, densities=(0.2, 0.5))
    options = {"method": ["magnitude", "lowrank"], "density": None, "budget": limit}
    counts, results = [], []
    for folder, stop in ((tmp_path, 3), (tmp_path, None), (tmp_path, None)):
        try:
            tell = None if stop is None else stopping(stop)
            results.append(content(small(folder, progress=tell, **options)))
        except StoppedError:
            pass
        counts.append((fitted.count("budget"), fitted.count("_fits")))
    n_fits = sum(row.status == "compressed" for row in results[0][1])
    assert counts == [(4 * N_LAYERS, 3), (4 * N_LAYERS, n_fits), (4 * N_LAYERS, n_fits)]
    assert results[0] == results[1]


def test_a_file_that_is_cut_is_made_again(tmp_path, fitted):
    whole = content(small(tmp_path, "matched"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == N_LAYERS + 2
    del fitted[:]
    for file, size in ((files[1], 100), (files[4], 0)):
        os.truncate(file, size)
    assert content(small(tmp_path, "matched")) == whole
    assert 0 < len(fitted) <= 2


def test_a_block_of_other_fits_is_trained_again(tmp_path, monkeypatch):
    small(tmp_path, "matched")
    (tmp_path / "00001.safetensors").unlink()
    own, trainings, match = _fits.fit_layer, [], sequential.match_block

    def other(factorizer, matrices, *args, **options):
        return own(factorizer, [W[::-1].copy() for W in matrices], *args, **options)

    def counted(name, *args):
        trainings.append(name)
        return match(name, *args)

    monkeypatch.setattr(_fits, "fit_layer", other)
    monkeypatch.setattr(sequential, "match_block", counted)
    blocks = small(tmp_path, "matched").report.metadata["blocks"]
    assert trainings[0] == "blocks.0"
    assert all(each["after"] <= each["before"] for each in blocks)


def changed(model):
    with torch.no_grad():
        model.blocks[1].norm.bias[3] += 1e-6
    return model


OTHERS = {
    "other weights": {"model": changed(Network())},
    "other batches": {"x": batches(2)},
    "feedback was True and is False": {"mode": "no feedback"},
    "calibration was": {"mode": "no calibration"},
    "density was 0.4 and is 0.3": {"density": 0.3},
    "method was 'MagnitudePruner' and is 'WandaPruner'": {"method": "wanda"},
    "head was .* and is None": {"layers": "blocks"},
    "budget was None and is": {"budget": 0.5, "density": None},
}


@pytest.mark.parametrize("what", OTHERS)
def test_folders_of_other_runs_are_refused_before_any_work(what, tmp_path, fitted):
    with pytest.raises(StoppedError):
        small(tmp_path, progress=stopping(1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"begun with other options or weights: .*{what}"):
        small(tmp_path, **OTHERS[what])
    assert len(fitted) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_supports_count_by_their_content(tmp_path):
    runs = []
    for seed in (0, 1, 0):
        masks = FixedSupport.random((12, 12), 60, random_state=seed), None
        method = DoubleSparseFactorizer(max_iter=2, constraints=masks)
        try:
            runs.append(content(small(tmp_path, method=method, density=0.5, layers="head")))
        except ValueError as error:
            runs.append(str(error))
    assert runs[0] == runs[2]
    assert "other constraints" in runs[1]


def test_a_run_that_has_finished_nothing_does_not_keep_its_folder(tmp_path):
    with pytest.raises(ValueError, match="weights of the budget must name layers"):
        small(tmp_path, density=None, budget=Budget(0.5, weights={"nowhere": 1.0}))
    assert len(small(tmp_path).report) == N_LAYERS


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        small(tmp_path)


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    def tell(row, total):
        with pytest.raises(ValueError, match="being written by another process"):
            small(tmp_path)

    assert len(small(tmp_path, progress=tell).report) == N_LAYERS


def test_random_numbers_are_those_of_the_first_run(tmp_path):
    model = Network()
    torch.manual_seed(5)
    whole = content(small(None, model=model))
    with pytest.raises(StoppedError):
        small(tmp_path, model=model, progress=stopping(3))
    torch.manual_seed(6)
    assert content(small(None, model=model)) != whole
    before = torch.get_rng_state()
    assert content(small(tmp_path, model=model)) == whole
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_tokenizers_are_compared_by_content(tmp_path):
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.head(self.table(ids))

    def given():
        return [UserDict(ids=torch.arange(9).roll(i)[None]) for i in range(4)]

    first, again = (
        compress(Ids(), "magnitude", density=0.5, calibration=each, resume_folder=tmp_path)
        for each in (given(), iter(given()))
    )
    assert content(first) == content(again)


def test_values_that_cannot_be_compared_are_named(tmp_path):
    x = [{"x": batch, "y": lambda: 0} for batch in batches()]
    with pytest.raises(ValueError, match=r"calibration must be comparable .* a list is not"):
        small(tmp_path, x=x)


def test_gradual_compression_refuses_it(tmp_path):
    with pytest.raises(ValueError, match="resume_folder must be None"):
        compress_gradually(Network(), density=0.5, train=print, resume_folder=tmp_path)


def test_a_single_batch_is_refused_also_with_a_budget():
    with pytest.raises(ValueError, match="put it into a list"):
        compress(Network(), "magnitude", budget=0.5, calibration=batches()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def test_a_file_is_refused_as_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(ValueError, match="file must be a folder, but is a file"):
        compress(torch.nn.Linear(8, 8), "magnitude", density=0.5, resume_folder=path)
    assert path.read_text() == "content"
