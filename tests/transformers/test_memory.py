"""Memory that loading a repository takes, measured in a fresh process.

Pages of files that safetensors maps are not counted: the kernel drops them when it needs memory.
"""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from matfact.torch import compress  # noqa: E402

#: Prints the bytes of the network and the largest growth of memory while it is loaded.
LOAD = """
import sys, threading, time, torch, transformers
import matfact.transformers
from matfact.torch import FactorizedLinear, compress
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])  # imports, and compiled code

def held():
    with open("/proc/self/status") as file:
        return int(next(x for x in file if x.startswith("RssAnon")).split()[1]) << 10

start = peak = held()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, held())

thread = threading.Thread(target=watch)
thread.start()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
done.set()
thread.join()
tensors = [*model.parameters(), *model.buffers()]
assert any(isinstance(m, FactorizedLinear) for m in model.modules())
print(sum(t.nbytes for t in tensors), peak - start)
"""


def save(folder, width, **options):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    small, _ = compress(model, layers="proj", **options)
    small.save_pretrained(folder, max_shard_size="4MB")
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory of a process")
@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude", "density": 0.25},
        {"method": "magnitude", "density": 0.25, "value_bits": 4},
        {"method": "lowrank", "density": 0.25},
        {"method": "rtn"},
    ],
    ids=["sparse", "sparse, 4 bits", "low rank", "rounded"],
)
def test_loading_takes_the_compressed_network_and_a_shard(options, tmp_path):
    dense = save(tmp_path / "large", 1024, **options)
    save(tmp_path / "small", 64, **options)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "large", tmp_path / "small"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    compressed, grown = map(int, done.stdout.split())
    shard = max(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert compressed < 0.8 * dense
    assert grown <= 1.2 * compressed + shard, (dense, compressed, grown, shard)
