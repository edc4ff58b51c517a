"""Factorize weight matrices into products of sparse and structured factors."""

from matfact.factorizers import LowRank, MagnitudePruner

__version__ = "0.1.0"

__all__ = ["LowRank", "MagnitudePruner"]
