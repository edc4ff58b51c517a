"""What ``save_pretrained`` writes of a compressed network, ``from_pretrained`` reads."""

import copy
import json
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import matfact.transformers  # noqa: E402
from matfact.torch import FactorizedConv, FactorizedLinear, compress, prune_neurons  # noqa: E402
from tests.transformers.networks import NAMES, compressed, dense, inputs, logits  # noqa: E402
from tests.wild.architectures import ARCHITECTURES  # noqa: E402

FACTORIZED = (FactorizedConv, FactorizedLinear)


def factorized(model):
    return [name for name, module in model.named_modules() if isinstance(module, FACTORIZED)]


def cast(batch, dtype):
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_same_to_the_bit(name, dtype, tmp_path):
    compressed(name).save_pretrained(tmp_path / "first")
    kind = type(compressed(name))
    small = kind.from_pretrained(tmp_path / "first", dtype=dtype)
    batch = cast(inputs(name), dtype)
    small.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = kind.from_pretrained(tmp_path / "shards", dtype=dtype, device_map="auto")
    assert factorized(again) == factorized(compressed(name))
    assert not again.training
    assert torch.equal(logits(again, batch), logits(small, batch))
    if dtype == torch.float32:
        assert torch.equal(logits(again, batch), logits(compressed(name), batch))
    for (key, a), (_, b) in zip(
        small.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert a.dtype == b.dtype, key
        assert torch.equal(a, b), key


def test_the_configuration_tells_kinds_shapes_and_bits(tmp_path):
    small = compressed("llama")
    small.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "matfact"
    assert sorted(entry["layers"]) == sorted(factorized(small))
    layer = entry["layers"]["model.layers.0.mlp.down_proj"]
    (product,) = layer["factors"]
    assert product[0]["shape"] == [32, 48]
    assert product[0]["bits"] == 8
    assert product[0]["values"] == small.model.layers[0].mlp.down_proj.to_product().nnz
    assert (tmp_path / "generation_config.json").is_file()


def test_other_heads_read_the_same_network(tmp_path):
    small, batch = compressed("llama"), inputs("llama")
    small.save_pretrained(tmp_path / "whole")
    hidden = small.model(**batch)[0]
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(base(**batch)[0], hidden)
    base.save_pretrained(tmp_path / "base")
    for kind in ("AutoModelForSequenceClassification", "AutoModelForCausalLM"):
        model = getattr(transformers, kind).from_pretrained(tmp_path / "base")
        assert torch.equal(model.model(**batch)[0], hidden)


def test_a_part_of_a_network_can_be_saved(tmp_path):
    small, batch = compressed("llama"), inputs("llama")
    small.model.save_pretrained(tmp_path)
    again = transformers.LlamaModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch)[0], small.model(**batch)[0])


@pytest.mark.parametrize("name", ["mixtral", "squeezebert", "convnext", "wav2vec2", "albert"])
def test_experts_convolutions_and_shared_layers(name, tmp_path):
    """Of convolutions some have groups, or a weight that is computed."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    small, _ = compress(architecture.build().eval(), "magnitude", density=0.5)
    batch = architecture.batch(torch.Generator().manual_seed(0))
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert factorized(again) == factorized(small) != []
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], small(**batch)[0])


def test_layers_that_files_join_keep_their_own_names(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True,
        image_size=16, patch_size=4,
    )  # fmt: skip
    small, _ = compress(transformers.Dinov2Model(config).eval(), "magnitude", density=0.5)
    small.save_pretrained(tmp_path)
    again = transformers.Dinov2Model.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x)[0], small(x)[0])
    assert factorized(again) == factorized(small)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("then_compressed", [False, True])
def test_pruned_units_stay_pruned(name, then_compressed, tmp_path):
    batch = inputs(name)
    small = prune_neurons(dense(name), [batch, inputs(name, 1)], 0.5).model
    assert small.num_parameters() < dense(name).num_parameters()
    if then_compressed:
        small, _ = compress(small, "magnitude", density=0.5)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert again.num_parameters() == small.num_parameters()
    assert torch.equal(logits(again, batch), logits(small, batch))
    again.save_pretrained(tmp_path / "again")
    third = type(small).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(third, batch), logits(small, batch))


def _with_a_compressed_part():
    """Return a network of parts that were compressed, of which one has no configuration."""
    model = dense("llama")
    model.model = compress(model.model, "magnitude", density=0.5, layers="attn").model
    block = compress(model.model.layers[0].mlp, "magnitude", density=0.5).model
    model.model.layers[0].mlp = block
    return model


def test_networks_of_compressed_parts_are_saved_once_they_are_attached(tmp_path):
    model, batch = _with_a_compressed_part(), inputs("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must know .*attach\(model\)"):
        model.save_pretrained(tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.safetensors"))
    assert any("factors" in name for name in model.state_dict())  # only repositories need it
    matfact.transformers.attach(model).save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert factorized(again) == factorized(model) != []
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_layers_put_in_by_hand_are_not_saved_unless_attached(tmp_path):
    model = dense("llama")
    model.model.layers[0].mlp = compress(model.model.layers[0].mlp, "magnitude", density=0.5).model
    with pytest.raises(ValueError, match="must know of its factorized layers"):
        model.save_pretrained(tmp_path)


def test_other_values_than_those_of_the_network_are_not_dropped(tmp_path):
    small, batch = compressed("llama"), inputs("llama")
    state = small.state_dict()
    small.save_pretrained(tmp_path / "own", state_dict=state)  # as accelerate does
    again = type(small).from_pretrained(tmp_path / "own")
    assert torch.equal(logits(again, batch), logits(small, batch))
    for change in (lambda x: x / 2, lambda x: x.half()):
        other = {k: change(v) if v.is_floating_point() else v for k, v in state.items()}
        with pytest.raises(ValueError, match="state_dict must hold the values of the network"):
            small.save_pretrained(tmp_path / "other", state_dict=other)


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    small = compressed("bert")
    small.cls.predictions.transform = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"'cls.predictions.transform.*' has shape .* here and"):
        small.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_state_dicts_of_repositories_load(tmp_path):
    """As Trainer does when it resumes."""
    from safetensors.torch import load_file

    small, batch = compressed("llama"), inputs("llama")
    small.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    other = compressed("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other, batch), logits(small, batch))
    with pytest.raises(RuntimeError, match="size mismatch"):
        dense("llama").load_state_dict(state, strict=False)
    plain, _ = compress(dense("llama"), "lowrank", density=0.5)
    with pytest.raises(ValueError, match="like those of the network's layer"):
        plain.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_state_dicts_load_into_networks_from_repositories(name, tmp_path):
    """Also layers that lie outside of the base model, such as heads."""
    from safetensors.torch import load_file

    small = compressed(name)
    small.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    again = type(small).from_pretrained(tmp_path)
    for other in (again, copy.deepcopy(again)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(state, strict=name == "llama")  # else the file lacks shared ones
        assert torch.equal(logits(other, inputs(name)), logits(small, inputs(name)))


def test_half_and_float_work_after_loading(tmp_path):
    compressed("bert").save_pretrained(tmp_path)
    again = type(compressed("bert")).from_pretrained(tmp_path)
    assert next(again.half().parameters()).dtype == torch.float16
    assert next(again.float().parameters()).dtype == torch.float32


def _places(module, prefix, away):
    """Yield where a network lies, of which the module `away` lies on a disk."""
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield prefix + name, "cpu"
    for name, child in module.named_children():
        if f"{away}.".startswith(f"{prefix}{name}.") and prefix + name != away:
            yield from _places(child, f"{prefix}{name}.", away)
        else:
            yield prefix + name, "disk" if prefix + name == away else "cpu"


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_layers_on_a_disk_stay_there(name, tmp_path):
    """Only whether they are applied by kernels or by torch differs."""
    small, batch = compressed(name), inputs(name)
    small.save_pretrained(tmp_path / "repository")
    first = next(
        n
        for n, m in small.named_modules()
        if type(m) is torch.nn.ModuleList and not re.search(r"kernels|factors", n)
    )
    places = dict(_places(small, "", f"{first}.0"))
    again = type(small).from_pretrained(
        tmp_path / "repository", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    away = [n for n, p in again.named_parameters() if p.is_meta and ".factors." in n]
    assert away
    torch.testing.assert_close(logits(again, batch), logits(small, batch), rtol=1e-4, atol=1e-4)
    assert all(again.get_parameter(n).is_meta for n in away)
    again.save_pretrained(tmp_path / "again")
    third = type(small).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(third, batch), logits(small, batch))
