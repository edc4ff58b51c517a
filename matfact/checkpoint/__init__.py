"""Networks on disk: factors and the remaining tensors, readable with NumPy alone.

``docs/checkpoint-format.md`` describes the format.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
