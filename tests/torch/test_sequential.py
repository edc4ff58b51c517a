"""Sequential calibration of many networks, compared with plain passes of the current network."""

import contextvars
import copy
import itertools
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.calibration import MapStatistics  # noqa: E402
from matfact.torch import compress, input_statistics  # noqa: E402
from matfact.torch.calibration import sequential  # noqa: E402
from matfact.torch.calibration.sequential import sequential_statistics  # noqa: E402
from matfact.torch.calibration.statistics import captured, layer_views  # noqa: E402
from matfact.torch.layers._matricized import matricized  # noqa: E402
from matfact.torch.running import _mapped  # noqa: E402


class Cached(nn.Module):
    """A block that adds to a list it is given, changes its input in place, and skips a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))
        self.skipped = nn.Linear(5, 5)

    def forward(self, x, seen):
        seen.append(x.mean())
        hidden = torch.tanh(self.first(x)) + self.third(x) * sum(seen)
        x += self.second(hidden)
        return x


class Stack(nn.Module):
    def __init__(self, n_blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Cached() for _ in range(n_blocks))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x, seen = x.clone(), []
        for block in self.blocks:
            x = block(x, seen=seen)
        return self.head(x)


class Residual(nn.Module):
    """Convolutions in a block that contains a list of modules."""

    def __init__(self):
        super().__init__()
        self.convolve = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        return torch.relu(self.convolve(x)) + self.shortcut(x)


class Shared(nn.Module):
    """A block that is called twice, and another under two names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Stack(1), nn.Linear(2, 5)])
        self.alias = self.blocks[0].head

    def forward(self, x):
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.alias(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.tanh(self.up(x)))


class Telling(nn.Module):
    """Blocks read their scale from an attribute set by the network."""

    def __init__(self, told, block=Two):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head, self.told = nn.Linear(5, 2), told

    def forward(self, x):
        self.told.scale = float(x.abs().mean())
        for block in self.blocks:
            x = block(x, self.told) if isinstance(block, Reading) else block(x)
        return self.head(x)


class Reading(Two):
    def forward(self, x, told):
        return super().forward(x, told.scale)


class Local(threading.local):
    def __deepcopy__(self, memo):
        return Local()


class Told:
    """An attribute of an object that is no module."""


class Remembering(Two):
    """A block that leaves a context variable to the next."""

    seen = contextvars.ContextVar("seen", default=1.0)

    def forward(self, x):
        x = super().forward(x, self.seen.get())
        self.seen.set(float(x.abs().mean()))
        return x


class Forgetting(nn.Module):
    def forward(self, x):
        Remembering.seen.set(1.0)
        return x


class Handling(Two):
    """A block with handlers that take every exception, and one that the network handles."""

    def forward(self, x):
        try:
            up = self.up(x)
        except:  # noqa: E722
            self.down(torch.zeros(2, 7))
            raise ValueError("no up") from None
        return x + self.down(torch.tanh(up))


class Calling(nn.Module):
    """A module that holds no block, and calls those it is given."""

    def forward(self, x, blocks):
        for block in blocks:
            x = block(x)
        return x


class CalledByAnother(Stack):
    def __init__(self):
        super().__init__()
        self.blocks, self.run = nn.ModuleList(Two() for _ in range(2)), Calling()

    def forward(self, x):
        return self.head(self.run(x, list(self.blocks)))


def networks():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    images = [torch.randn(2, 4, 6, 6) for _ in range(2)]
    vectors = [torch.randn(n, 5) for n in (20, 1, 7)]
    yield "state", Stack(), vectors
    yield "convolutions", nn.Sequential(nn.Conv2d(4, 4, 3), Residual(), Residual()), images
    yield (
        "encoder",
        nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        [torch.randn(3, 4, 8)],
    )
    yield "shared", Shared(), vectors
    yield "language model", *language_model()
    scaled = [scale * x for scale, x in zip((1.0, 3.0, 9.0), vectors, strict=True)]
    yield "object", Telling(Told(), Reading), scaled
    yield "thread", Telling(Local(), Reading), scaled
    yield "context", nn.Sequential(Forgetting(), *(Remembering() for _ in range(3))), vectors
    yield "handlers", Telling(Told(), Handling), vectors
    yield "called by another", CalledByAnother(), vectors


def language_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 30}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, **heads))
    tokens = torch.randint(30, (4, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return model, [{"input_ids": t, "attention_mask": mask} for t in tokens.split(2)]


FORMS = ["state", "convolutions", "encoder", "shared", "language model", "object", "thread"]


@pytest.fixture(params=[*FORMS, "context", "handlers", "called by another"])
def network(request):
    torch.manual_seed(0)
    for name, model, batches in networks():
        if name == request.param:
            return model.eval(), batches
    raise AssertionError


@pytest.mark.parametrize(("form", "waits"), [("state", True), ("object", False)])
def test_layers_say_so_where_batches_cannot_wait_before_blocks(form, waits):
    torch.manual_seed(0)
    ((model, batches),) = ((m, b) for name, m, b in networks() if name == form)
    _, report = compress(model, "wanda", density=0.5, calibration=batches)
    said = [row.layer for row in report if "runs of the whole network" in row.message]
    assert said == ([] if waits else [row.layer for row in report])


def perturbed(layer):
    """Return another layer of the same form."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(0.9).add_(0.1 * other.weight.abs().mean())
    return other


def put(model, old, new):
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


def all_inputs(model, name, batches):
    """Return the statistics of what enters a layer in a plain pass, all calls counted."""
    return captured(model, batches, layer_views(model, [name]))[name].by_matrix()


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_statistics_are_those_of_the_network_with_all_that_was_replaced(
    network, paired, offloaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(_mapped, "_LEAST", 1)
    folder = tmp_path if offloaded else None
    model, batches = network
    dense, present = copy.deepcopy(model), copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    expected = {n for n in names if input_statistics(model, batches, [n])}
    given = copy.deepcopy(batches)
    walked = []
    for name, statistics in sequential_statistics(
        model, names, batches, paired=paired, folder=folder
    ):
        walked.append(name)
        now, before = (all_inputs(network, name, batches) for network in (present, dense))
        matrices = matricized(model.get_submodule(name)).arrays()
        for found, plain, twins, W in zip(
            statistics.by_matrix(), now, before, matrices, strict=True
        ):
            for sums, wanted, twin in zip(found, plain, twins, strict=True):
                assert (sums is None) == (wanted is None)
                if sums is None:  # no batch is kept aside
                    continue
                inputs = sums.inputs if paired else sums
                assert inputs.count == wanted.count
                np.testing.assert_allclose(inputs.gram, wanted.gram, rtol=1e-4, atol=1e-4)
                if paired:
                    energy = MapStatistics(twin, W).energy
                    np.testing.assert_allclose(sums.energy, energy, rtol=1e-4)
        other = perturbed(present.get_submodule(name))
        for each in (model, present):
            put(each, each.get_submodule(name), copy.deepcopy(other))
    assert set(walked) == expected
    assert len(walked) == len(expected)
    for batch, copied in zip(batches, given, strict=True):
        torch.testing.assert_close(batch, copied)  # as they were given
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not list(tmp_path.iterdir())


def test_more_batches_than_threads_could_wait_for_are_refused(monkeypatch):
    monkeypatch.setattr(sequential, "MOST_PASSES", 6)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    assert list(sequential_statistics(model, ["0"], [x] * 6))
    with pytest.raises(ValueError, match="at most 6 batches"):
        list(sequential_statistics(model, ["0"], itertools.repeat(x)))
    with pytest.raises(ValueError, match=r"at most 3 batches .* with feedback"):
        list(sequential_statistics(model, ["0"], [x] * 4, paired=True))


def test_a_disk_that_is_full_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_mapped.mmap, "mmap", full)
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 8))
    with pytest.raises(OSError, match="No space left"):
        list(sequential_statistics(model, ["0", "1"], [torch.randn(100, 64)], folder=tmp_path))
    assert not list(tmp_path.iterdir())
    assert "forward" not in vars(model[0])


def test_what_is_offloaded_is_what_was_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(_mapped, "_LEAST", 1)
    entered = {}

    class Block(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.linear, self.dtype = nn.Linear(4, 4), dtype

        def forward(self, x):
            entered[self] = x
            return (100 * self.linear(x.float())).to(self.dtype)

    dtypes = ["float32", "bfloat16", "float64", "int16", "bool", "float16"]
    model = nn.Sequential(*(Block(getattr(torch, dtype)) for dtype in dtypes))
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    expected, entered = list(entered.values()), {}
    for _ in sequential_statistics(model, [f"{i}.linear" for i in range(6)], [x], folder=tmp_path):
        pass
    for found, wanted in zip(entered.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
