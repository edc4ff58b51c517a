"""Products of factors, and one storage format per structure of a factor."""

from matfact.operators._block import BlockSparseFactor
from matfact.operators._csr import SparseFactor
from matfact.operators._dense import DenseFactor
from matfact.operators._dispatch.advice import Advice
from matfact.operators._factor import Factor
from matfact.operators._kronecker import KroneckerSparseFactor
from matfact.operators._product import FactorProduct
from matfact.operators._quantized import QuantizedFactor
from matfact.operators._selection import SelectionFactor
from matfact.operators._sign import SignFactor

__all__ = [
    "Advice",
    "BlockSparseFactor",
    "DenseFactor",
    "Factor",
    "FactorProduct",
    "KroneckerSparseFactor",
    "QuantizedFactor",
    "SelectionFactor",
    "SignFactor",
    "SparseFactor",
]
