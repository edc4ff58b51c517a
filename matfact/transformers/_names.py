"""Names of layers and tensors in files, and in a network of `transformers`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from matfact.torch.checkpoint._building import built

_WEIGHT = ".weight"


def tensors(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names in `model` of those tensors that it has, by their `names` in a repository.

    A network may be loaded with another head than it was saved with, or without any, and files may
    use names of earlier releases.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    found = {}
    for name in names:
        for rules in ([], renamings):
            own, _ = rename_source_key(name, rules, [], model.base_model_prefix, state)
            if own in state:
                found[name] = own
                break
    return found


def layers(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the same for layers."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found = {name: name for name in names if name in modules}  # also if it computes its weight
    own = tensors(model, [f"{name}.weight" for name in names if name not in modules])
    return found | {
        n.removesuffix(_WEIGHT): there.removesuffix(_WEIGHT) for n, there in own.items()
    }


def converted(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the tensors in a repository that are split or joined while it is loaded.

    Nothing if `transformers` cannot build the network, which could not be loaded either.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        model: Any = built(lambda: getattr(transformers, config.architectures[0])(config))
    except Exception:  # whatever the classes of the network raise
        return []
    mapping = get_model_conversion_mapping(model)
    changing = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return [n for n in names if any(e.rename_source_key(n)[1] is not None for e in changing)]


def keep_own(model: Any, names: Iterable[str]) -> None:
    """Let files name tensors as `model` does, if they would join layers in `names` with others."""
    mapping = getattr(model, "_weight_conversions", None)
    mapping = get_model_conversion_mapping(model) if mapping is None else mapping
    joining = [e.reverse_transform() for e in mapping if isinstance(e, WeightConverter)]
    weights = [f"{name}{_WEIGHT}" for name in names]
    if any(e.rename_source_key(weight)[1] is not None for e in joining for weight in weights):
        model._weight_conversions = []


def keep_precision(model: Any) -> None:
    """Make weights float32 that the architecture keeps so, as ``from_pretrained`` does."""
    half = {torch.float16: model._keep_in_fp32_modules, torch.bfloat16: None}
    for name, parameter in model.named_parameters():
        kept = [*(half.get(parameter.dtype) or ()), *(model._keep_in_fp32_modules_strict or ())]
        if parameter.dtype in half and any(re.search(p.replace("*", ".*"), name) for p in kept):
            parameter.data = parameter.data.float()
