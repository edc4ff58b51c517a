"""What ``save_pretrained`` of `transformers` is about to save, for checks that it cannot ask for.

It ignores factors of networks that do not know of them, and a state dict it is given for those that
do. Only the calls under way tell.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any


def saved_now() -> dict[str, Any]:
    """Return the variables of the innermost ``save_pretrained`` under way, empty if there is none.

    ``self`` and ``state_dict`` are its arguments.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    kind = getattr(modeling, "PreTrainedModel", None)
    if kind is None:
        return {}
    saving, frame = inspect.unwrap(kind.save_pretrained).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not saving:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def refuse_unattached() -> None:
    """Raise ``ValueError`` if ``save_pretrained`` of a network without our quantizer is running.

    It would write factors under names that ``from_pretrained`` ignores, and draw the weights at
    random. A network may have got its layers from parts that were compressed before.
    """
    model = saved_now().get("self")
    if model is None or getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved
        return
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(method, "quant_method", None) != "matfact":
        raise ValueError(
            f"{type(model).__name__} must know of its factorized layers before it is saved, else "
            "they would be loaded as random ones: call matfact.transformers.attach(model)."
        )
