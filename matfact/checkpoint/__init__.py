"""Networks on disk: factors beside the tensors that stay as they are, readable with NumPy alone.

The layout is described in ``docs/checkpoint-format.md``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
