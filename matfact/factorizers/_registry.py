"""Factorizers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sklearn.base import clone

from matfact.factorizers._admm_pruner import ADMMPruner
from matfact.factorizers._base import BaseFactorizer
from matfact.factorizers._block_svd import BlockSVD
from matfact.factorizers._butterfly import ButterflyFit
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

#: A method: its name in the registry, or a name of one's own and an unfitted estimator.
MethodLike = str | tuple[str, BaseFactorizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes
    ----------
    label : str
        What figures call it.
    estimator : BaseFactorizer
        What is fitted, its density aside.
    needs_inputs : bool
        Whether it is another method only by calibration inputs.
    """

    label: str
    estimator: BaseFactorizer
    needs_inputs: bool = False


def has_density(estimator: BaseFactorizer) -> bool:
    """Whether `estimator` can be asked for a number of stored values."""
    return "density" in estimator.get_params(deep=False)


def at_density(estimator: BaseFactorizer, density: float | None) -> BaseFactorizer:
    """Return a clone of `estimator` at a density, or as it is for None.

    Raises
    ------
    ValueError
        If it has no such parameter.
    """
    copy = clone(estimator)
    if density is None:
        return copy
    if not has_density(copy):
        name = type(copy).__name__
        raise ValueError(
            f"density must be None for {name}, which has no such parameter, got {density}."
        )
    return copy.set_params(density=density)


# Left to choose, a butterfly for a quarter of the values would have two factors and be a Monarch
# matrix; its chain of many 2×2 blocks is what the name stands for.
#: All of them, in the order of tables and figures.
METHODS: dict[str, Method] = {
    "dsf": Method("Double sparse (DSF)", DoubleSparseFactorizer()),
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
#: Those that are compared on weights alone, at the same number of stored values.
COMPARED = {
    name: method
    for name, method in METHODS.items()
    if not method.needs_inputs and has_density(method.estimator)
}


def label(method: str) -> str:
    """Return what figures call the method named `method`."""
    return METHODS[method].label if method in METHODS else method


def make_estimators(methods: Sequence[MethodLike] | None) -> dict[str, BaseFactorizer]:
    """Return an unfitted estimator for each method, by name.

    Raises
    ------
    ValueError
        If a name is unknown or comes twice, or an entry is of another kind.
    """
    estimators: dict[str, BaseFactorizer] = {}
    for method in COMPARED if methods is None else methods:
        if isinstance(method, str) and method in COMPARED:
            name, estimator = method, COMPARED[method].estimator
        elif isinstance(method, tuple) and isinstance(method[-1], BaseFactorizer):
            name, estimator = method
        else:
            raise ValueError(
                f"methods must hold names among {', '.join(COMPARED)} or pairs "
                f"(name, factorizer), got {method!r}."
            )
        if name in estimators:
            raise ValueError(f"methods must have different names, got {name!r} twice.")
        estimators[name] = clone(estimator)
    if not estimators:
        raise ValueError("methods must hold at least one method, got none.")
    return estimators
