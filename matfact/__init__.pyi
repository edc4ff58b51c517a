__all__ = [
    "ADMMPruner",
    "BlockSVD",
    "ButterflyFit",
    "CoSaMPNeuronSelector",
    "DoubleBinaryFactorizer",
    "DoubleSparseFactorizer",
    "KaleidoscopeFit",
    "LowRank",
    "MagnitudePruner",
    "MonarchProjector",
    "Palm4MSA",
    "Quantized",
    "WandaPruner",
    "compare_projections",
]

from . import allocation as allocation
from . import calibration as calibration
from . import checkpoint as checkpoint
from . import compare as compare
from . import constraints as constraints
from . import factorizers as factorizers
from . import metrics as metrics
from . import operators as operators
from . import torch as torch
from . import transforms as transforms
from .compare import compare_projections
from .factorizers import (
    ADMMPruner,
    BlockSVD,
    ButterflyFit,
    CoSaMPNeuronSelector,
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    KaleidoscopeFit,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    Palm4MSA,
    Quantized,
    WandaPruner,
)

__version__: str
