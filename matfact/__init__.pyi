__all__ = [
    "GPTQ",
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
    "OBSPruner",
    "Palm4MSA",
    "Quantized",
    "RoundToNearest",
    "SparseGPT",
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
    GPTQ,
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
    OBSPruner,
    Palm4MSA,
    Quantized,
    RoundToNearest,
    SparseGPT,
    WandaPruner,
)

__version__: str
