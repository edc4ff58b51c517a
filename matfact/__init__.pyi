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

from .compare import compare_projections
from .factorizers import (
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

__version__: str
