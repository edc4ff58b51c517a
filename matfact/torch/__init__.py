"""Compress trained PyTorch networks: layers, capture, compression, fine-tuning, pruning."""

import lazy_loader

# The public names and their homes are in __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
