"""The methods compared, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import matfact.factorizers
from matfact.factorizers import BaseFactorizer

#: A method: its name in a registry, or a name of one's own and an unfitted estimator.
MethodLike = str | tuple[str, BaseFactorizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes
    ----------
    label : str
        What figures and tables call it.
    estimator : str
        Class that is fitted, with its default parameters but for the density.
    """

    label: str
    estimator: str


#: Every method compared by default, in the order of tables and figures.
METHODS: dict[str, Method] = {
    "dsf": Method("Double sparse (DSF)", "DoubleSparseFactorizer"),
    "palm4msa": Method("Palm4MSA", "Palm4MSA"),
    "butterfly": Method("Butterfly", "ButterflyFit"),
    "blocksvd": Method("Block SVD", "BlockSVD"),
    "monarch": Method("Monarch", "MonarchProjector"),
    "lowrank": Method("Low rank (SVD)", "LowRank"),
    "magnitude": Method("Magnitude pruning", "MagnitudePruner"),
}


def label(method: str) -> str:
    """Return what figures and tables call the method named `method`."""
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
            name = method
            estimator = getattr(matfact.factorizers, METHODS[method].estimator)()
        elif (
            isinstance(method, tuple) and len(method) == 2 and isinstance(method[1], BaseFactorizer)
        ):
            name, estimator = method
        else:
            raise ValueError(
                f"methods must hold names among {', '.join(METHODS)} or pairs "
                f"(name, factorizer), got {method!r}."
            )
        if name in estimators:
            raise ValueError(f"methods must have different names, got {name!r} twice.")
        estimators[name] = estimator
    if not estimators:
        raise ValueError("methods must hold at least one method, got none.")
    return estimators
