"""Compress trained PyTorch networks: layers, calibration, compression, fine-tuning, pruning."""

import lazy_loader

# Public names and their modules are listed in __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
