"""Repositories that are damaged, hostile, or read by programs without matfact."""

import copy
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from matfact.torch import compress, prune_neurons  # noqa: E402
from matfact.transformers import MatfactConfig  # noqa: E402
from tests.transformers.networks import NAMES, compressed, dense, inputs  # noqa: E402

WITHOUT = """
import sys, warnings, transformers
for argument in sys.argv[1:]:
    kind, _, folder = argument.partition("@")
    for loader in (getattr(transformers, kind), transformers.AutoModel):
        try:
            loader.from_pretrained(folder)
        except RuntimeError as error:
            assert "size" in str(error), error
        else:
            raise SystemExit(f"{loader} loaded {folder}")
assert not any(name.startswith("matfact") for name in sys.modules)
print("refused")
"""


def test_programs_without_matfact_refuse(tmp_path):
    """They know neither the method nor the names of factors, and would draw random weights."""
    arguments = []
    for name in NAMES:
        small = compressed(name)
        small.save_pretrained(tmp_path / name)
        arguments.append(f"{type(small).__name__}@{tmp_path / name}")
    narrow = prune_neurons(dense("llama"), [inputs("llama")], 0.5).model
    narrow.save_pretrained(tmp_path / "narrow")
    arguments.append(f"LlamaForCausalLM@{tmp_path / 'narrow'}")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.strip() == "refused"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    compressed("llama").save_pretrained(folder)
    return folder


def entry(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


LAYER = "model.layers.0.mlp.down_proj"


def change(*path, to):
    def changed(content):
        content = at = copy.deepcopy(content)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        return content

    return changed


HOSTILE = {
    "version": change("version", to=2),
    "version is true": change("version", to=True),
    "layout": change("layout", to="in, out"),
    "layers": change("layers", to=[1]),
    "a layer": change("layers", LAYER, to=None),
    "nbytes": change("layers", LAYER, "nbytes", to=-1),
    "nbytes is huge": change("layers", LAYER, "nbytes", to=1 << 70),
    "factors": change("layers", LAYER, "factors", to=[]),
    "a product": change("layers", LAYER, "factors", 0, to=[]),
    "a factor": change("layers", LAYER, "factors", 0, 0, to=5),
    "kind": change("layers", LAYER, "factors", 0, 0, "kind", to="pickle"),
    "kind is a list": change("layers", LAYER, "factors", 0, 0, "kind", to=[]),
    "shape": change("layers", LAYER, "factors", 0, 0, "shape", to=[1 << 40, 48]),
    "shape of one": change("layers", LAYER, "factors", 0, 0, "shape", to=[32]),
    "values": change("layers", LAYER, "factors", 0, 0, "values", to=10**9),
    "bits": change("layers", LAYER, "factors", 0, 0, "bits", to=64),
    "name": change("layers", "x" * 2000, to={}),
    "narrowed": change("narrowed", to={"a.weight": [[4], [8]]}),
    "narrowed is text": change("narrowed", to="all"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_invalid_configurations_are_refused_by_name(what, repository):
    content = HOSTILE[what](entry(repository))
    member = what.split()[0] if what.split()[0] in ("version", "layout", "narrowed") else "layers"
    with pytest.raises(ValueError, match=rf"^quantization_config\.{member}.* in config.json must"):
        MatfactConfig(**content)


def loaded(repository, folder, tensors=lambda state: state, config=lambda content: content):
    """Load a changed copy of a repository."""
    folder.mkdir(exist_ok=True)
    state = tensors(load_file(repository / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((repository / "config.json").read_text())
    content["quantization_config"] = config(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def test_an_unchanged_copy_loads(repository, tmp_path):
    loaded(repository, tmp_path / "copy")


MISFITS = {
    "other kinds": change("layers", LAYER, "factors", 0, 0, "kind", to="csr"),
    "other numbers of values": change("layers", LAYER, "factors", 0, 0, "values", to=3),
    "other bits": change("layers", LAYER, "factors", 0, 0, "bits", to=2),
    "another shape": change("layers", LAYER, "factors", 0, 0, "shape", to=[32, 32]),
    "two products": lambda content: change(
        "layers", LAYER, "factors", to=2 * content["layers"][LAYER]["factors"]
    )(content),
    "no layer": lambda content: change(
        "layers", "model.norm", to=content["layers"][LAYER]
    )(content),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_configurations_of_other_networks_are_refused(what, repository, tmp_path):
    with pytest.raises(ValueError, match=r"must (describe this architecture|hold the factors)"):
        loaded(repository, tmp_path / "copy", config=MISFITS[what])


def test_a_missing_layer_is_named(repository, tmp_path):
    def without(state):
        return {k: v for k, v in state.items() if k != f"{LAYER}.weight"}

    with pytest.raises(ValueError, match=rf"lacks {LAYER}.weight"):
        loaded(repository, tmp_path / "copy", tensors=without)


def test_a_layer_of_another_size_is_refused(repository, tmp_path):
    def cut(state):
        return state | {f"{LAYER}.weight": state[f"{LAYER}.weight"][:-8].clone()}

    with pytest.raises(RuntimeError, match="size"):
        loaded(repository, tmp_path / "copy", tensors=cut)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_raise_or_are_values(seed, repository, tmp_path):
    """Each changed byte of a header is an error; a value may become another value."""
    generator = torch.Generator().manual_seed(seed)

    def damaged(state):
        content = state[f"{LAYER}.weight"]
        length = int.from_bytes(bytes(content[:8].tolist()), "little")
        place = int(torch.randint(0, 8 + length - 8, (1,), generator=generator))
        content[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
        return state

    with pytest.raises(ValueError, match=LAYER):
        loaded(repository, tmp_path / "copy", tensors=damaged)


def test_a_dense_network_is_not_taken_for_a_compressed_one(tmp_path):
    dense("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=MatfactConfig())


def test_networks_of_gguf_files_are_saved_if_their_layers_are_dense(tmp_path):
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    for packed in ({}, {"a.weight": object()}):
        model = dense("bert")
        model.hf_quantizer = gguf.GgufHfQuantizer(transformers.GgufConfig())
        model.hf_quantizer.packed_modules = packed
        small, _ = compress(model, "magnitude", density=0.5)
        if packed:
            with pytest.raises(ValueError, match="GgufHfQuantizer has some"):
                small.save_pretrained(tmp_path)
        else:
            small.save_pretrained(tmp_path)
            again = type(model).from_pretrained(tmp_path)
            assert type(again.hf_quantizer).__name__ == "MatfactQuantizer"
            torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_other_quantizers_are_refused(tmp_path):
    class OtherQuantizer:
        pass

    model = dense("bert")
    model.hf_quantizer = OtherQuantizer()
    small, _ = compress(model, "magnitude", density=0.5)
    with pytest.raises(ValueError, match="OtherQuantizer has some"):
        small.save_pretrained(tmp_path)
