"""Compressed networks in repositories of Hugging Face `transformers`.

Importing this module registers the quantization method ``"matfact"``, by which ``from_pretrained``
reads what ``save_pretrained`` has written of a compressed network.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "matfact.transformers needs transformers 5: pip install 'matfact[transformers]'."
    ) from _error

from matfact.transformers._config import MatfactConfig
from matfact.transformers._quantizer import MatfactQuantizer, attach

__all__ = ["MatfactConfig", "MatfactQuantizer", "attach"]
