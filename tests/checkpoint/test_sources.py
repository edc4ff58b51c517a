"""Source networks: files of the tensors, and shared tensors."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from matfact import MagnitudePruner
from matfact.checkpoint import UnreadIndexWarning, compress

HALF = MagnitudePruner(density=0.5)


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.fc.weight": (24, 16) for i in range(4)} | {"norm.weight": (16,)}
    random = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return random | {"steps": torch.arange(3)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


def write_index(folder, places):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_sharded_weights_give_the_same_tensors(source, tmp_path):
    folder, places = tmp_path / "sharded", {}
    folder.mkdir()
    for i, name in enumerate(tensors()):
        file = f"model-{i % 3}.safetensors"
        places[name] = file
        save_file({n: tensors()[n] for n, f in places.items() if f == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    one = compress(source, tmp_path / "one", HALF)
    for given in (folder, index):
        many = compress(given, tmp_path / "many", HALF)
        assert one.tensors == many.tensors
        for name, value in one.items():
            dense = [v if isinstance(v, np.ndarray) else v.toarray() for v in (value, many[name])]
            np.testing.assert_array_equal(*dense)


@pytest.mark.parametrize(
    "places",
    [
        {"w": "../model.safetensors"},
        {"w": "/etc/passwd"},
        {"w": "..\\model.safetensors"},
        {"missing": "model.safetensors"},
        {"steps": 3},
        ["steps"],
    ],
)
def test_an_index_that_lies_is_refused(places, source, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        compress(index, tmp_path / "out", HALF)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sharded(tmp_path):
    """Two files, and what an index should say of them."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a.weight": torch.randn(24, 16), "b.weight": torch.randn(24, 16)}, folder / "1")
    save_file({"c.weight": torch.randn(24, 16), "c.bias": torch.ones(24)}, folder / "2")
    return folder, {"a.weight": "1", "b.weight": "1", "c.weight": "2", "c.bias": "2"}


def test_tensors_that_an_index_does_not_name_are_kept(sharded, tmp_path):
    folder, places = sharded
    del places["b.weight"], places["c.bias"]
    write_index(folder, places)
    network = compress(folder, tmp_path / "out", HALF)
    assert set(network) == {"a.weight", "b.weight", "c.weight", "c.bias"}
    assert network.tensors["b.weight"].is_product


def test_tensors_that_two_files_hold_are_refused(sharded, tmp_path):
    folder, places = sharded
    save_file({"b.weight": torch.randn(24, 16), "c.weight": torch.randn(24, 16)}, folder / "2")
    del places["c.bias"]
    with pytest.raises(ValueError, match=r"'b.weight' is in '1' and in '2'"):
        compress(write_index(folder, places), tmp_path / "out", HALF)
    assert not (tmp_path / "out").exists()


def test_a_single_file_is_read_before_an_index_and_this_is_said(sharded, tmp_path):
    folder, places = sharded
    index = write_index(folder, places)
    save_file({"a.weight": torch.full((24, 16), 7.0)}, folder / "model.safetensors")
    with pytest.warns(UnreadIndexWarning, match=r"safetensors and .*the first is read"):
        network = compress(folder, tmp_path / "single", HALF)
    assert set(network) == {"a.weight"}
    np.testing.assert_array_equal(np.unique(network["a.weight"].toarray()), [0, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(compress(index, tmp_path / "indexed", HALF)) == set(places)


class LanguageModel(nn.Module):
    """An output layer that is tied to the table of embeddings, and one that is tied to another."""

    def __init__(self):
        super().__init__()
        self.tokens, self.lm_head = nn.Embedding(60, 32), nn.Linear(32, 60, bias=False)
        self.up, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.lm_head.weight = self.tokens.weight
        self.again.weight = self.up.weight


def test_weights_that_modules_share_are_kept_as_in_memory(tmp_path):
    save_model(LanguageModel(), str(tmp_path / "noted.safetensors"))
    network = compress(tmp_path / "noted.safetensors", tmp_path / "noted", HALF)
    assert network.tensors["lm_head.weight"].note == "weight shared with tokens.weight"
    assert network.tensors["again.weight"].note == "weight shared with up.weight"
    assert not any(tensor.is_product for tensor in network.tensors.values())


@pytest.mark.parametrize("layers", [None, "lm_head|fc", "embed|lm_head|fc"])
def test_an_output_layer_with_the_numbers_of_the_embeddings_is_kept_like_them(layers, tmp_path):
    table, other = torch.randn(60, 32), torch.randn(60, 32)
    content = {"embed_tokens.weight": table, "lm_head.weight": table.clone(), "fc.weight": other}
    save_file(content, tmp_path / "m.safetensors")
    network = compress(tmp_path / "m.safetensors", tmp_path / "out", HALF, layers=layers)
    assert [name for name, t in network.tensors.items() if t.is_product] == ["fc.weight"]
    assert "shared with embed_tokens.weight" in network.tensors["lm_head.weight"].note
    content["lm_head.weight"][0, 0] += 1
    save_file(content, tmp_path / "untied.safetensors")
    network = compress(tmp_path / "untied.safetensors", tmp_path / "untied", HALF, layers=layers)
    assert network.tensors["lm_head.weight"].is_product
