"""The estimators, one file each."""

from matfact.factorizers._base import BaseFactorizer
from matfact.factorizers._lowrank import LowRank
from matfact.factorizers._magnitude import MagnitudePruner

__all__ = ["BaseFactorizer", "LowRank", "MagnitudePruner"]
