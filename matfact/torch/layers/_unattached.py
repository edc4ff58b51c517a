"""Refusal to let `transformers` save networks that do not know of their factorized layers."""

from __future__ import annotations

import inspect
import sys
from typing import Any


def refuse_unattached() -> None:
    """Raise ``ValueError`` if ``save_pretrained`` of a network without our quantizer is running.

    It would write factors under names that ``from_pretrained`` ignores, and draw the weights at
    random. A network may get its layers from parts that were compressed before, and `transformers`
    asks nobody but the whole network, so that only the calls under way tell which one is saved.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None:
        return
    saving, frame = inspect.unwrap(kind.save_pretrained).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not saving:
        frame = frame.f_back
    if frame is None:
        return
    model = frame.f_locals["self"]
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    has_only_adapters = getattr(model, "_hf_peft_config_loaded", False)
    if getattr(method, "quant_method", None) != "matfact" and not has_only_adapters:
        raise ValueError(
            f"{type(model).__name__} must know of its factorized layers before it is saved, else "
            "they would be loaded as random ones: call matfact.transformers.attach(model)."
        )
