"""Write a small Llama in a sparse format of the installed release of compressed-tensors.

    pip install --no-deps --target old compressed-tensors==0.9.4
    PYTHONPATH=old python write.py sparse-bitmask float16 bitmask-0.9.4

Releases 0.3 to 0.14 have these formats. The file ``….dense.safetensors`` beside the folder holds what that release reads back.
"""

import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 36, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip


def pruned(weight: torch.Tensor, is_24: bool) -> torch.Tensor:
    """Return a weight without its smallest entries, and with a negative zero."""
    groups = weight.reshape(-1, 4) if is_24 else weight.reshape(1, -1)
    smallest = groups.abs().argsort(dim=1)[:, : groups.shape[1] // 2 if is_24 else -100]
    weight = groups.scatter(1, smallest, 0.0).reshape(weight.shape)
    weight[0, :4] = torch.tensor([0.0, 0.5, -0.0, 0.0])  # the second value of a 2:4 group
    return weight


def main(form: str, dtype: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    state = {n: W.clone() for n, W in model.state_dict().items() if n != "lm_head.weight"}
    for name, W in state.items():
        if name.endswith("proj.weight"):
            state[name] = pruned(W * 4, "24" in form)
    config = SparsityCompressionConfig.load_from_registry(form, targets=["Linear"])
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    compressor = ModelCompressor(sparsity_config=config)
    inner = compressor.sparsity_compressor
    try:
        layers = {n.removesuffix(".weight") for n in state if n.endswith("proj.weight")}
        held = inner.compress(state, compression_targets=layers)
    except TypeError:  # before 0.9, all tensors are compressed
        held = inner.compress(state)
    names = list(held)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for i, half in enumerate(halves, start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        content = {name: held[name].contiguous() for name in half}
        save_file(content, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    compressor.update_config(str(folder))
    dense = {name: W.contiguous() for name, W in inner.decompress(str(folder))}
    assert dense.keys() == state.keys()
    assert all(torch.equal(dense[name], state[name]) for name in state)
    save_file(dense, folder.with_name(f"{folder.name}.dense.safetensors"))
    print(compressed_tensors.__version__, form, sorted(places)[:4])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
