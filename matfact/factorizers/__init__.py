"""The estimators, one file each."""

from matfact.factorizers._base import BaseFactorizer
from matfact.factorizers._block_svd import BlockSVD
from matfact.factorizers._lowrank import LowRank
from matfact.factorizers._magnitude import MagnitudePruner

__all__ = ["BaseFactorizer", "BlockSVD", "LowRank", "MagnitudePruner"]
