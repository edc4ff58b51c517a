"""Third-party networks: compressed, calibrated, stored and trained."""

import copy
import functools
import os
import warnings

import pytest

torch = pytest.importorskip("torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may be downloaded

from torch import nn  # noqa: E402

from matfact.factorizers import DoubleSparseFactorizer  # noqa: E402
from matfact.torch import compress, load_network, save_network  # noqa: E402
from tests.wild.architectures import ARCHITECTURES  # noqa: E402

#: Float32, and a few layers behind each other that pass rounding errors on.
TOLERANCE = 1e3 * torch.finfo(torch.float32).eps
#: What calibration may lose by chance: it lowers errors of layers, one at a time, on the batches
#: it has, and the error measured is that of the whole network on others.
CHANCE = 1.05


class Wild:
    """One network, batches for it, and what was made of it, each once."""

    def __init__(self, name):
        self.architecture = ARCHITECTURES[name]
        self._made = {}
        torch.manual_seed(0)
        self.calibration = [self.batch(seed) for seed in range(10)]
        self.fresh = [self.batch(seed) for seed in range(100, 104)]
        self.model = with_statistics(self.architecture.build(), self.calibration[0])

    def batch(self, seed):
        return self.architecture.batch(torch.Generator().manual_seed(seed))

    @functools.cached_property
    def outputs(self):
        return answers(self.model, self.fresh)

    def compressed(self, method, density, calibrated):
        key = method, density, calibrated
        if key not in self._made:
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # layers that are kept, which the report tells too
                self._made[key] = compress(
                    self.model,
                    DoubleSparseFactorizer(max_iter=10) if method == "dsf" else method,
                    density=density,
                    calibration=self.calibration if calibrated else None,
                    **self.architecture.options,
                )
        return self._made[key]

    def error(self, model):
        return float((answers(model, self.fresh) - self.outputs).norm() / self.outputs.norm())


@torch.no_grad()
def with_statistics(model, batch):
    """Return `model` in eval mode, its batch normalizations with statistics of a batch."""
    norms = [m for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # means of all batches
    if norms:
        called(model, batch)
    return model.eval()


def called(model, batch):
    torch.manual_seed(7)  # for networks that draw in eval mode too
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def answer(model, batch):
    """Return the output for what is no padding."""
    output = called(model, batch)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    masks = batch if isinstance(batch, dict) else {}
    mask = masks.get("decoder_attention_mask", masks.get("attention_mask"))
    if mask is None or mask.shape != output.shape[:2]:
        return output.flatten(0, -2)
    return output[mask.bool()]


@torch.no_grad()
def answers(model, batches):
    return torch.cat([answer(model, batch) for batch in batches])


#: Near relatives of others in the list, and those that take long, for the slow run.
LATER = {
    "bit", "detr", "falcon", "gemma", "gpt_neox", "marian", "mistral", "mobilenet_v2", "phi",
    "qwen2", "qwen2_moe", "qwen3", "resnet", "rwkv", "swin", "whisper",
}  # fmt: skip
PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in ARCHITECTURES
]


@pytest.fixture(scope="module", params=PARAMETERS)
def wild(request):
    return Wild(request.param)


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
def test_all_entries_stored_change_nothing(wild, calibrated):
    error = wild.error(wild.compressed("magnitude", 1.0, calibrated).model)
    assert error < TOLERANCE


def test_calibration_does_no_harm(wild):
    alone, calibrated = (
        wild.error(wild.compressed("dsf", 0.5, calibrated).model) for calibrated in (False, True)
    )
    assert calibrated <= CHANCE * alone


def test_every_matrix_is_in_the_report_or_listed_as_untouched(wild):
    report = wild.compressed("dsf", 0.5, True).report
    untouched = set(report.metadata["untouched"])
    layers = tuple(f"{row.layer}." for row in report)  # which parametrizations may be inside of
    names = {}
    for name, parameter in wild.model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            names.setdefault(parameter, set()).add(name)
    missed = [
        found
        for found in names.values()
        if not any(name in untouched or name.startswith(layers) for name in found)
    ]
    assert not missed


def test_kept_layers_say_why_and_all_others_are_compressed(wild):
    rows = wild.compressed("dsf", 0.5, True).report
    assert {row.status for row in rows} <= {"compressed", "kept"}
    assert all(row.message for row in rows if row.status == "kept")
    assert any(row.status == "compressed" for row in rows)
    assert all(row.layer_error > 0 for row in rows if row.layer_error is not None)


@pytest.mark.parametrize("is_built", [False, True], ids=["instance", "builder"])
def test_saved_and_loaded_networks_answer_the_same(wild, is_built, tmp_path):
    model = wild.compressed("dsf", 0.5, True).model
    save_network(model, tmp_path / "network")
    torch.manual_seed(2)  # weights of its own
    build = wild.architecture.build
    loaded = load_network(build if is_built else build(), tmp_path / "network").eval()
    difference = answers(loaded, wild.fresh) - answers(model, wild.fresh)
    assert float(difference.abs().max()) == 0.0


def test_a_training_step_leaves_supports(wild):
    model = copy.deepcopy(wild.compressed("dsf", 0.5, True).model).train()
    before, weights = positions(model), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output = answer(model, wild.calibration[0])
    loss = nn.functional.mse_loss(output, torch.linspace(-1, 1, output.numel()).view_as(output))
    loss.backward()
    optimizer.step()
    after = positions(model)
    assert torch.isfinite(loss)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [not torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def positions(model):
    """Return the buffers of factorized layers, which say where values are."""
    layers = [m for m in model.modules() if type(m).__module__.startswith("matfact.")]
    return {
        (i, name): buffer.clone()
        for i, layer in enumerate(layers)
        for name, buffer in layer.named_buffers()
    }


@pytest.mark.parametrize(
    "name", [pytest.param("vit_mae", marks=pytest.mark.slow), "always_dropping"]
)
def test_networks_that_draw_are_compressed_reproducibly(name):
    states = []
    for _ in range(2):
        wild = Wild(name)
        states.append(wild.compressed("dsf", 0.5, True).model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
