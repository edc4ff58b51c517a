"""The methods compared, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sklearn.base import clone

from matfact.factorizers import (
    BaseFactorizer,
    BlockSVD,
    ButterflyFit,
    DoubleSparseFactorizer,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    Palm4MSA,
)

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
    """

    label: str
    estimator: BaseFactorizer


# Left to choose, a butterfly for a quarter of the values would have two factors and be a Monarch
# matrix; its chain of many 2×2 blocks is what the name stands for.
#: Every method compared by default, in the order of tables and figures.
METHODS: dict[str, Method] = {
    "dsf": Method("Double sparse (DSF)", DoubleSparseFactorizer()),
    "palm4msa": Method("Palm4MSA", Palm4MSA()),
    "butterfly": Method("Butterfly", ButterflyFit(chain="square_dyadic")),
    "blocksvd": Method("Block SVD", BlockSVD()),
    "monarch": Method("Monarch, best blocks", MonarchProjector()),
    "lowrank": Method("Low rank (SVD)", LowRank()),
    "magnitude": Method("Magnitude pruning", MagnitudePruner()),
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
    for method in METHODS if methods is None else methods:
        if isinstance(method, str) and method in METHODS:
            name, estimator = method, METHODS[method].estimator
        elif isinstance(method, tuple) and isinstance(method[-1], BaseFactorizer):
            name, estimator = method
        else:
            raise ValueError(
                f"methods must hold names among {', '.join(METHODS)} or pairs "
                f"(name, factorizer), got {method!r}."
            )
        if name in estimators:
            raise ValueError(f"methods must have different names, got {name!r} twice.")
        estimators[name] = clone(estimator)
    if not estimators:
        raise ValueError("methods must hold at least one method, got none.")
    return estimators
