"""Networks of factorized layers, saved and loaded."""

import copy
import os
from threading import Event, current_thread, main_thread

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from matfact import LowRank, MagnitudePruner, checkpoint  # noqa: E402
from matfact.checkpoint import Checkpoint, _reader  # noqa: E402
from matfact.torch import MonarchLinear, compress, load_network, save_network  # noqa: E402


class Network(nn.Module):
    """Convolutions, in groups too, an embedding tied to the output, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(32, 24)
        self.again = self.first
        self.embedding = nn.Embedding(10, 24)
        self.output = nn.Linear(24, 10)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        x = self.norm(self.grouped(self.conv(x))).flatten(1)
        x = self.first(x) + self.again(-x) + self.embedding(torch.tensor([3]))
        return self.output(x)


class Conv1D(nn.Module):
    """A layer with a transposed weight, as in the GPT-2 of `transformers`."""

    __module__ = "transformers.pytorch_utils"  # whose class is meant, and taken

    def __init__(self, n_outputs, n_inputs):
        super().__init__()
        self.nf = n_outputs
        self.weight = nn.Parameter(torch.randn(n_inputs, n_outputs))
        self.bias = nn.Parameter(torch.randn(n_outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def make(seed):
    torch.manual_seed(seed)
    return Network().eval()


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    return compress(make(0), "lowrank", density=0.5, layers="conv|grouped|first").model


def test_a_loaded_network_computes_the_same(network, tmp_path):
    save_network(network, tmp_path / "network", settings={"epochs": 3})
    loaded = load_network(make(1), tmp_path / "network")
    torch.testing.assert_close(loaded(X), network(X))  # sums depend on alignment
    assert loaded.again is loaded.first
    assert loaded.output.weight is loaded.embedding.weight
    assert checkpoint.Checkpoint(tmp_path / "network").settings["epochs"] == 3
    again = load_network(copy.deepcopy(network), tmp_path / "network")  # factorized already
    torch.testing.assert_close(again(X), network(X))


def test_what_modules_share_is_stored_once(network, tmp_path):
    save_network(network, tmp_path / "network")
    names = set(checkpoint.Checkpoint(tmp_path / "network"))
    assert len(names & {"embedding.weight", "output.weight"}) == 1
    assert len(names & {"first.weight", "again.weight"}) == 1
    assert {"conv.weight", "grouped.kernels.0.weight", "grouped.kernels.1.weight"} <= names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_bit_is_kept(dtype, network, tmp_path):
    network = network.to(dtype)
    save_network(network, tmp_path / "network")
    loaded = load_network(make(1).to(dtype), tmp_path / "network").state_dict()
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == loaded[name].dtype
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("factorizer", [MagnitudePruner(density=0.5), LowRank(density=0.5)])
def test_what_the_command_line_wrote_is_the_network_it_decompresses_to(factorizer, tmp_path):
    dense = make(0)
    weights = {k: v for k, v in dense.state_dict().items() if k[:5] not in ("again", "outpu")}
    weights["output.bias"] = dense.output.bias.detach()
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint.compress(tmp_path / "model.safetensors", tmp_path / "network", factorizer)
    checkpoint.decompress(tmp_path / "network", tmp_path / "dense.safetensors")
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=False)
    loaded = load_network(make(1), tmp_path / "network")
    assert type(loaded.first).__name__ == "FactorizedLinear"
    torch.testing.assert_close(loaded(X), dense(X), rtol=1e-4, atol=1e-5)


def test_layers_that_keep_their_weight_transposed_keep_their_meaning(tmp_path):
    torch.manual_seed(0)
    dense, x = nn.Sequential(Conv1D(40, 40), Conv1D(12, 40)), torch.randn(3, 40)
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    checkpoint.compress(tmp_path / "model.safetensors", tmp_path / "cli", LowRank(density=0.5))
    checkpoint.decompress(tmp_path / "cli", tmp_path / "dense.safetensors")
    from_cli = load_network(copy.deepcopy(dense), tmp_path / "cli")
    save_network(from_cli, tmp_path / "saved")
    from_saved = load_network(copy.deepcopy(dense), tmp_path / "saved")
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    for loaded in (from_cli, from_saved):
        torch.testing.assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-4)


def test_layers_built_from_scratch_are_saved(tmp_path):
    torch.manual_seed(0)
    first, second = (nn.Sequential(MonarchLinear(16, 16), nn.Linear(16, 2)) for _ in range(2))
    save_network(first, tmp_path / "network")
    x = torch.randn(3, 16)
    loaded = load_network(second, tmp_path / "network").eval()
    torch.testing.assert_close(loaded(x), first.eval()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "extra", nn.Linear(2, 2)), "lacks extra.weight"),
        (lambda model: delattr(model, "norm"), "also has norm"),
        (lambda model: setattr(model, "first", nn.Linear(31, 24)), "first.weight"),
        (lambda model: setattr(model, "norm", nn.BatchNorm2d(9)), "norm.weight"),
    ],
)
def test_another_architecture_is_refused_and_left_as_it_is(change, message, network, tmp_path):
    save_network(network, tmp_path / "network")
    other = make(1)
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_network(other, tmp_path / "network")
    after = other.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tensors_that_either_side_lacks_are_ignored_on_request(network, tmp_path):
    save_network(network, tmp_path / "network")
    other = make(1)
    other.extra = nn.Linear(2, 2)
    del other.norm
    before = other.extra.weight.clone()
    load_network(other, tmp_path / "network", strict=False)
    assert torch.equal(other.extra.weight, before)
    assert torch.equal(other.first.factors[0].values, network.first.factors[0].values)


def test_an_earlier_network_is_left_alone(network, tmp_path):
    save_network(network, tmp_path / "network")
    with pytest.raises(FileExistsError, match="path must name"):
        save_network(network, tmp_path / "network")
    assert os.listdir(tmp_path) == ["network"]


def test_a_network_can_be_built_while_it_is_loaded(network, tmp_path):
    save_network(network, tmp_path / "small")
    built = []

    def build():
        built.append(make(1))
        assert all(parameter.is_meta for parameter in built[0].parameters())
        return built[0]

    loaded = load_network(build, tmp_path / "small").eval()
    assert loaded is built[0]
    torch.testing.assert_close(loaded(X), network(X))
    assert loaded.output.weight is loaded.embedding.weight
    assert loaded.first is loaded.again
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()  # in memory, not in the file
    again = load_network(lambda: make(2), tmp_path / "small").eval()
    torch.testing.assert_close(again(X), network(X))


def test_a_flipped_bit_in_any_file_is_told_whoever_checks_it(network, tmp_path):
    save_network(network, tmp_path / "network")
    for path in sorted((tmp_path / "network").glob("*.safetensors")):
        intact = path.read_bytes()
        path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{path.name} is damaged: its checksum"):
            load_network(lambda: make(1), tmp_path / "network")
        path.write_bytes(intact[:-1])
        with pytest.raises(ValueError, match=f"{path.name} must be a file of {len(intact)} bytes"):
            load_network(lambda: make(1), tmp_path / "network")
        path.write_bytes(intact)
    load_network(lambda: make(1), tmp_path / "network")


def test_each_file_is_checked_once_by_another_thread_or_by_who_uses_it(
    network, tmp_path, monkeypatch
):
    save_network(network, tmp_path / "network")
    original, checked, begun, used = _reader.check_shard, [], Event(), Event()

    def watched(folder, shard, in_memory):
        assert in_memory
        checked.append((shard.file, current_thread() is main_thread()))
        if len(checked) == 1:  # the other thread is held up with the largest
            begun.set()
            assert used.wait(60)
        return original(folder, shard, in_memory=True)

    monkeypatch.setattr(_reader, "check_shard", watched)
    loading = checkpoint.Checkpoint(tmp_path / "network")
    largest = max(loading.shards, key=lambda shard: shard.nbytes)
    with loading.reading_ahead():
        assert begun.wait(60)
        for shard in loading.shards:
            if shard is not largest:
                loading.file(shard.tensors[0].name)
        used.set()
        loading.file(largest.tensors[0].name)
    names = [shard.file for shard in loading.shards if shard is not largest]
    assert checked == [(largest.file, False), *((name, True) for name in names)]


def test_a_network_that_is_built_needs_all_of_its_parameters(network, tmp_path):
    save_network(network.conv, tmp_path / "part")
    with pytest.raises(ValueError, match="it lacks"):
        load_network(lambda: make(1), tmp_path / "part", strict=False)
    assert not next(make(1).parameters()).is_meta


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16"])
def test_packed_numbers_are_kept_bit_by_bit(dtype, tmp_path):
    def build(fill):
        layer = nn.Linear(4, 4)
        bits = (torch.arange(16) * fill).to(torch.uint16 if dtype == "uint16" else torch.uint8)
        layer.register_buffer("packed", bits.view(getattr(torch, dtype)).reshape(4, 4).T)
        return nn.Sequential(layer)

    model = build(1)
    save_network(model, tmp_path / "network")
    loaded = load_network(build(0), tmp_path / "network")
    raw = torch.int16 if dtype == "uint16" else torch.uint8
    assert torch.equal(loaded[0].packed.view(raw), model[0].packed.view(raw))


def test_a_tensor_that_no_file_can_hold_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"'0\.weight': .*complex128"):
        save_network(model, tmp_path / "network")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)), "lacks"),
        (lambda: nn.Sequential(nn.Linear(6, 8)), "also has"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), "shape"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Bilinear(8, 2, 4)), "shape|lacks|also has"),
    ],
)
def test_nothing_is_read_of_a_checkpoint_that_does_not_fit(other, problem, tmp_path, monkeypatch):
    network, _ = compress(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), LowRank(rank=1))
    save_network(network, tmp_path / "network")
    read = []
    monkeypatch.setattr(Checkpoint, "product", lambda self, name: read.append(name))
    with pytest.raises(ValueError, match=problem):
        load_network(other(), tmp_path / "network")
    assert not read


def test_a_saved_network_tells_what_was_done_to_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    batches = [torch.randn(20, 16) for _ in range(3)]
    small, report = compress(model, density=0.5, keep=("last",), calibration=batches)
    save_network(small, tmp_path / "small", report=report)
    told = Checkpoint(tmp_path / "small").report
    assert told.rows == report.rows
    assert told.metadata == report.metadata
    stored = Checkpoint(tmp_path / "small").tensors["0.weight"]
    assert stored.method == "DoubleSparseFactorizer"
    assert stored.relative_error == report[0].relative_error


def test_a_compressed_file_tells_what_was_done_to_its_layers(tmp_path):
    save_file(
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).state_dict(), tmp_path / "m.safetensors"
    )
    compressed = checkpoint.compress(
        tmp_path / "m.safetensors", tmp_path / "out", MagnitudePruner(0.25)
    )
    (row,) = compressed.report
    assert (row.layer, row.status, row.method) == ("0", "compressed", "MagnitudePruner")
    assert row.density == 0.25
    assert row.nbytes < row.dense_nbytes
    assert 0 < row.relative_error < 1


def test_a_report_that_is_none_is_refused(tmp_path):
    checkpoint.save(tmp_path / "n", {"a": torch.ones(2)}, settings={"report": {"rows": 3}})
    with pytest.raises(ValueError, match="report"):
        Checkpoint(tmp_path / "n").report  # noqa: B018
