"""Factorize weight matrices into products of sparse and structured factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from matfact._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "allocation": (),
            "calibration": (),
            "checkpoint": (),
            "compare": ("compare_projections",),
            "constraints": (),
            "factorizers": [name for name in __all__ if name != "compare_projections"],
            "metrics": (),
            "operators": (),
            "torch": (),
            "transforms": (),
        },
    )
