"""Recognition of weights in a file by names, shapes, dtypes and neighbours."""

import pytest

from matfact._layers import kept_tensors
from matfact._safetensors import TensorSpec


def taken(**tensors):
    """Return the weights among tensors given by dtype and shape, or only by shape."""
    specs = {
        name: TensorSpec(*(spec if isinstance(spec[0], str) else ("F32", spec)))
        for name, spec in tensors.items()
    }
    return sorted(specs.keys() - kept_tensors(specs).keys())


WEIGHTS = {
    "a linear layer": {"fc.weight": (8, 4), "fc.bias": (8,)},
    "one without bias": {"fc.weight": (8, 4)},
    "one that keeps its weight transposed": {"c_attn.weight": (4, 12), "c_attn.bias": (12,)},
    "a convolution in one dimension": {"conv1.weight": (8, 4, 3)},
    "one in two, of depth": {"conv.weight": (8, 1, 3, 3), "conv.bias": (8,)},
    "one in three": {"conv.weight": (8, 4, 3, 3, 3)},
    "half precision": {"fc.weight": ("BF16", (8, 4))},
    "complex numbers": {"fc.weight": ("C64", (8, 4))},
    "patches of an image": {"patch_embed.proj.weight": (8, 3, 4, 4)},
    "a linear layer named after embeddings": {"embed.0.weight": (8, 4), "embed.0.bias": (8,)},
    "one inside of an embedder": {"embedder.model.query.weight": (8, 4)},
    "one that follows a normalization": {"norm1.linear.weight": (8, 4)},
    "the network itself": {"weight": (8, 4), "bias": (8,)},
    "a layer beside buffers of its parent": {"attn.q.weight": (8, 4), "attn.bias": (1, 1, 9, 9)},
    "names that only begin alike": {"fc.weight": (8, 4), "fc2.scale": (8,), "fc-b.gain": (8,)},
}  # fmt: skip

OTHERS = {
    "a bias": {"fc.bias": (8, 4)},
    "a causal mask": {"h.0.attn.bias": (1, 1, 64, 64)},
    "a vector": {"norm.weight": (8,)},
    "a number": {"fc.weight": ("F32", ())},
    "nothing": {"fc.weight": (0, 4)},
    "six axes": {"fc.weight": (2,) * 6},
    "whole numbers": {"fc.weight": ("I8", (8, 4))},
    "packed numbers": {"fc.weight": ("F8_E4M3", (8, 4)), "fc.weight_scale_inv": (1, 1)},
    "scales": {"q.qweight": ("I32", (8, 4)), "q.scales": ("F16", (8, 4))},
    "numbers that are scaled": {"fc.weight": ("BF16", (8, 4)), "fc.weight_scale": (1,)},
    "numbers that are looked up": {"fc.weight": (8, 4), "fc.weight.absmax": (8,)},
    "a weight that is observed": {"fc.weight": (8, 4), "fc.weight_fake_quant.scale": (1,)},
    "a weight with an adapter": {"fc.weight": (8, 4), "fc.bias": (8,), "fc.lora_A": (2, 4)},
    "a weight that is standardized": {"conv.weight": (8, 4, 3, 3), "conv.gain": (8, 1, 1, 1)},
    "a normalization over two axes": {"norm.weight": (8, 4), "norm.bias": (8, 4)},
    "a transposed convolution": {"up.weight": (8, 4, 2, 2), "up.bias": (4,)},
    "a table of embeddings": {"model.embed_tokens.weight": (60, 8)},
    "a list of tables": {"embed_tokens.0.weight": (60, 8)},
    "GPT-2's tables": {"wte.weight": (60, 8), "wpe.weight": (60, 8)},
    "T5's tables": {"shared.weight": (60, 8), "relative_attention_bias.weight": (32, 8)},
    "a norm of heads": {"attn.q_norm.weight": (4, 8)},
    "joint projections": {"attn.in_proj_weight": (12, 4)},
    "recurrent weights": {"rnn.weight_ih_l0": (12, 4), "rnn.weight_hh_l0": (12, 4)},
    "parts of a parametrized weight": {"fc.parametrizations.weight.original0": (8, 4)},
    "tables of positions": {"attn.relative_position_bias_table": (49, 8), "pos_embed": (1, 9, 8)},
    "experts in one tensor": {"experts.gate_up_proj": (4, 8, 16)},
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_linear_layers_and_convolutions_are_taken(case):
    (weight,) = (name for name in WEIGHTS[case] if name.rpartition(".")[2] == "weight")
    assert taken(**WEIGHTS[case]) == [weight]


@pytest.mark.parametrize("case", OTHERS)
def test_nothing_else_is_taken_whatever_its_shape(case):
    assert taken(**OTHERS[case]) == []


def test_each_tensor_that_is_kept_has_a_reason_and_names_can_be_wrong():
    specs = {name: TensorSpec("F32", (8, 4)) for name in ("emb.weight", "fc.gain", "q.weight")}
    kept = kept_tensors(specs)
    assert {name: why.is_guess for name, why in kept.items()} == {
        "emb.weight": True, "fc.gain": False,
    }  # fmt: skip
    assert all(why.reason for why in kept.values())


def test_many_tensors_of_hostile_names_take_no_time():
    specs = {f"{'.' * 2000}{i}.weight": TensorSpec("F32", (8, 4)) for i in range(2000)}
    assert not kept_tensors(specs)
