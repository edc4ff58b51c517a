"""Networks of `transformers` learn how their layers are saved."""

from __future__ import annotations

import importlib
import warnings
from typing import TypeVar

from torch import nn

from matfact.torch._warnings import CompressionWarning

Network = TypeVar("Network", bound=nn.Module)


def attached(model: Network) -> Network:
    """Let ``save_pretrained`` of networks of `transformers` in `model` write their layers."""
    if not any(_is_pretrained(module) for module in model.modules()):
        return model
    try:  # by name, since it is on a floor above
        importlib.import_module("matfact.transformers").attach(model)
    except ImportError as error:
        message = f"save_pretrained cannot write compressed layers, only save_network can: {error}"
        warnings.warn(message, CompressionWarning, stacklevel=3)
    return model


def _is_pretrained(module: nn.Module) -> bool:
    names = {(base.__module__, base.__name__) for base in type(module).__mro__}
    return ("transformers.modeling_utils", "PreTrainedModel") in names
