"""Factorizers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sklearn.base import clone

from matfact.factorizers._admm_pruner import ADMMPruner
from matfact.factorizers._base import BaseFactorizer
from matfact.factorizers._block_svd import BlockSVD
from matfact.factorizers._butterfly import ButterflyFit
from matfact.factorizers._double_binary import DoubleBinaryFactorizer
from matfact.factorizers._dsf import DoubleSparseFactorizer
from matfact.factorizers._gptq import GPTQ
from matfact.factorizers._lowrank import LowRank
from matfact.factorizers._magnitude import MagnitudePruner
from matfact.factorizers._monarch import MonarchProjector
from matfact.factorizers._obs_pruner import OBSPruner
from matfact.factorizers._palm4msa import Palm4MSA
from matfact.factorizers._rtn import RoundToNearest
from matfact.factorizers._sparsegpt import SparseGPT
from matfact.factorizers._wanda_pruner import WandaPruner

#: A method: a registered name, or a pair of any name and an unfitted estimator.
MethodLike = str | tuple[str, BaseFactorizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes
    ----------
    label : str
        Name in figures.
    estimator : BaseFactorizer
        Estimator to clone; its density is set later.
    needs_inputs : bool
        Whether it differs from another method only with calibration inputs.
    """

    label: str
    estimator: BaseFactorizer
    needs_inputs: bool = False


# With chain="auto" a butterfly of density 0.25 would have two factors and be a Monarch matrix.
METHODS: dict[str, Method] = {
    "dsf": Method("Double sparse (DSF)", DoubleSparseFactorizer()),
    "double_binary": Method("Double binary (DBF)", DoubleBinaryFactorizer()),
    "palm4msa": Method("Palm4MSA", Palm4MSA()),
    "butterfly": Method("Butterfly", ButterflyFit(chain="square_dyadic")),
    "blocksvd": Method("Block SVD", BlockSVD()),
    "monarch": Method("Monarch, best blocks", MonarchProjector()),
    "lowrank": Method("Low rank (SVD)", LowRank()),
    "magnitude": Method("Magnitude pruning", MagnitudePruner()),
    "admm": Method("ADMM pruning", ADMMPruner(), needs_inputs=True),
    "wanda": Method("Wanda", WandaPruner(), needs_inputs=True),
    "sparsegpt": Method("SparseGPT", SparseGPT(), needs_inputs=True),
    "obs": Method("OBS (exact OBC)", OBSPruner(), needs_inputs=True),
    "rtn": Method("Rounding to nearest", RoundToNearest()),
    "gptq": Method("GPTQ", GPTQ(), needs_inputs=True),
}
"""All methods by name, in the order of tables and figures."""

#: Methods that can be compared without calibration inputs, at the same number of bits.
COMPARED_BY_BITS = {name: method for name, method in METHODS.items() if not method.needs_inputs}
COMPARED = {
    name: method for name, method in COMPARED_BY_BITS.items() if method.estimator.has_density
}
"""Methods that can be compared without calibration inputs, at the same number of stored values."""


def label(method: str) -> str:
    """Return the name of `method` in figures."""
    return METHODS[method].label if method in METHODS else method


def make_estimators(
    methods: Sequence[MethodLike] | None, *, by_bits: bool = False
) -> dict[str, BaseFactorizer]:
    """Return an unfitted estimator for each method, by name.

    Parameters
    ----------
    methods : sequence of str or (str, estimator), optional
        Names, or pairs of a name and an estimator; None for all that can be compared.
    by_bits : bool
        Whether they are compared at the same number of bits a weight.

    Raises
    ------
    ValueError
        If a name is unknown or repeated, or an entry is neither a name nor a pair.
    """
    estimators: dict[str, BaseFactorizer] = {}
    known = COMPARED_BY_BITS if by_bits else COMPARED
    for method in known if methods is None else methods:
        if isinstance(method, str) and method in known:
            name, estimator = method, known[method].estimator
        elif isinstance(method, tuple) and isinstance(method[-1], BaseFactorizer):
            name, estimator = method
        else:
            raise ValueError(
                f"methods must hold names among {', '.join(known)} or pairs "
                f"(name, factorizer), got {method!r}."
            )
        if name in estimators:
            raise ValueError(f"methods must have different names, got {name!r} twice.")
        estimators[name] = clone(estimator)
    if not estimators:
        raise ValueError("methods must hold at least one method, got none.")
    return estimators
