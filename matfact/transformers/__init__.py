"""Compressed networks in repositories of Hugging Face `transformers`.

Importing this module registers the quantization method ``"matfact"``, by which ``from_pretrained``
reads what ``save_pretrained`` has written of a compressed network.
"""

from typing import TYPE_CHECKING, Any

from matfact._text import extra

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"matfact.transformers needs transformers 5 or {extra('transformers')}."
    ) from _error

from matfact.transformers._config import MatfactConfig
from matfact.transformers._quantizer import MatfactQuantizer, attach

if TYPE_CHECKING:
    from matfact.transformers._peft import lora_config

__all__ = ["MatfactConfig", "MatfactQuantizer", "attach", "lora_config"]


def __getattr__(name: str) -> Any:
    if name != "lora_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from matfact.transformers._peft import lora_config
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            f"matfact.transformers.lora_config needs peft or {extra('peft')}."
        ) from error
    return lora_config
