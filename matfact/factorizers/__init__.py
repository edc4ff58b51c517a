"""The estimators, one file each."""

from matfact.factorizers._admm_pruner import ADMMPruner
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._block_svd import BlockSVD
from matfact.factorizers._butterfly import ButterflyFit
from matfact.factorizers._cosamp import CoSaMPNeuronSelector
from matfact.factorizers._double_binary import DoubleBinaryFactorizer
from matfact.factorizers._dsf import DoubleSparseFactorizer
from matfact.factorizers._gptq import GPTQ
from matfact.factorizers._kaleidoscope import KaleidoscopeFit
from matfact.factorizers._lowrank import LowRank
from matfact.factorizers._magnitude import MagnitudePruner
from matfact.factorizers._monarch import MonarchProjector
from matfact.factorizers._obs_pruner import OBSPruner
from matfact.factorizers._palm4msa import Palm4MSA
from matfact.factorizers._quantized import Quantized
from matfact.factorizers._registry import METHODS
from matfact.factorizers._rtn import RoundToNearest
from matfact.factorizers._sparsegpt import SparseGPT
from matfact.factorizers._wanda_pruner import WandaPruner

__all__ = [
    "DENSITY",
    "GPTQ",
    "METHODS",
    "ADMMPruner",
    "BaseFactorizer",
    "BlockSVD",
    "ButterflyFit",
    "CoSaMPNeuronSelector",
    "DoubleBinaryFactorizer",
    "DoubleSparseFactorizer",
    "Factorization",
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
]
