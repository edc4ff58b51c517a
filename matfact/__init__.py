"""Factorize weight matrices into products of sparse and structured factors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ADMMPruner",
    "BlockSVD",
    "ButterflyFit",
    "CoSaMPNeuronSelector",
    "DoubleSparseFactorizer",
    "KaleidoscopeFit",
    "LowRank",
    "MagnitudePruner",
    "MonarchProjector",
    "Palm4MSA",
    "WandaPruner",
    "compare_projections",
]

if TYPE_CHECKING:
    from matfact.compare import compare_projections
    from matfact.factorizers import (
        ADMMPruner,
        BlockSVD,
        ButterflyFit,
        CoSaMPNeuronSelector,
        DoubleSparseFactorizer,
        KaleidoscopeFit,
        LowRank,
        MagnitudePruner,
        MonarchProjector,
        Palm4MSA,
        WandaPruner,
    )
else:
    _SUBPACKAGES = (
        "allocation",
        "calibration",
        "checkpoint",
        "compare",
        "constraints",
        "factorizers",
        "metrics",
        "operators",
        "torch",
        "transforms",
    )

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that the command line starts at once."""
        if name in _SUBPACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = "compare" if name == "compare_projections" else "factorizers"
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__, *_SUBPACKAGES])
