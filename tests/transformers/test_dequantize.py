"""Compressed networks made dense again."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from matfact.torch import add_adapters, compress, prune_neurons  # noqa: E402
from tests.transformers.networks import NAMES, compressed, dense, inputs, logits  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_network_computes_the_same_and_needs_no_matfact(name, tmp_path):
    small, batch = compressed(name), inputs(name)
    before = logits(small, batch)
    small.save_pretrained(tmp_path / "small")
    loaded = type(small).from_pretrained(tmp_path / "small")
    for model in (small, loaded):
        assert model.dequantize() is model
        kinds = [type(module) for module in model.modules()]
        assert kinds == [type(module) for module in dense(name).modules()]
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    assert "matfact" not in (tmp_path / "dense" / "config.json").read_text()
    again = type(small).from_pretrained(tmp_path / "dense")
    assert not hasattr(again, "hf_quantizer") or again.hf_quantizer is None
    assert torch.equal(logits(again, batch), logits(loaded, batch))


def test_weights_have_the_dtype_of_the_factors_or_the_given_one():
    for dtype, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        model = compressed("llama", coded=False).to(torch.bfloat16).dequantize(dtype=dtype)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == expected


def narrowed():
    return prune_neurons(dense("llama"), [inputs("llama")], 0.5).model


def adapted():
    model = compressed("llama", coded=False)
    add_adapters(model, rank=2)
    return model


def tuned():
    peft = pytest.importorskip("peft")
    from matfact.transformers import lora_config

    model = compressed("llama", coded=False)
    model.add_adapter(lora_config(model, peft.LoraConfig(r=2, target_modules="all-linear")))
    return model


def replaced():
    model = dense("llama")
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 5)
    return compress(model, "magnitude", density=0.5).model


def shared():
    model = compressed("llama", coded=False)
    model.lm_head = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (narrowed, "was narrowed by"), (adapted, "no adapters"), (tuned, "without adapters"),
        (replaced, "'lm_head'"), (shared, r"'lm_head\.0'"),
    ],
)  # fmt: skip
def test_what_has_no_dense_network_is_refused_unchanged(build, named):
    model = build()
    before = list(model.modules())
    with pytest.raises(ValueError, match=named):
        model.dequantize()
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert model.hf_quantizer is not None
