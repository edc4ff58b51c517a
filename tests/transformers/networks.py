"""Tiny networks of transformers with random weights, compressed."""

import copy
import functools
import re
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from matfact.torch import compress  # noqa: E402
from tests.wild.architectures import ARCHITECTURES  # noqa: E402

#: Language models, encoders, both, and images.
NAMES = ["llama", "qwen3", "gpt2", "bert", "t5", "vit"]
#: Those that generate text.
WRITERS = ["llama", "qwen3", "gpt2", "t5"]
#: Other kinds of products for some of the layers.
OVERRIDES = {
    r"(\.q|q_proj|query)$": "monarch",
    r"(\.k|k_proj|key|c_attn)$": ("lowrank", 0.5),
    r"\.(wo|down_proj|output\.dense|mlp\.fc2)$": ("magnitude", 0.5, 8),
}


@functools.cache
def _dense(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


@functools.cache
def _compressed(name, coded):
    overrides = OVERRIDES if coded else {k: v for k, v in OVERRIDES.items() if type(v) is not tuple}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that are kept
        used = {k: v for k, v in overrides.items() if _matches(name, k)}
        return compress(_dense(name), "magnitude", density=0.5, overrides=used).model.eval()


def _matches(name, pattern):
    return any(re.search(pattern, module) for module, _ in _dense(name).named_modules())


def dense(name):
    """Return a network with all of its weights."""
    return copy.deepcopy(_dense(name))


def compressed(name, coded=True):
    """Return a network of sparse, structured and low-rank layers, some `coded` in few bits."""
    return copy.deepcopy(_compressed(name, coded))


def inputs(name, seed=0):
    """Return a batch without padding, whose outputs all count."""
    batch = ARCHITECTURES[name].batch(torch.Generator().manual_seed(seed))
    return {key: torch.ones_like(x) if "mask" in key else x for key, x in batch.items()}


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits
