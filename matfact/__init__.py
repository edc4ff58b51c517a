"""Factorize weight matrices into products of sparse and structured factors."""

import lazy_loader

__version__ = "0.2.0"

# Public names and their modules are listed in __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__.remove("torch")  # may not be installed
