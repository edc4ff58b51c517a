"""The other libraries, each imported only when it is measured."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.methods import Factors, Method, is_hadamard, is_power_of_two

_BACKEND = 2020  #: pyfaust's newer implementation: the same errors as 2016, in less time


def quietly(module: str) -> Any:
    """Import `module` without its warnings about what else could be installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def faust_factors(faust: Any, scale: float = 1.0) -> Factors:
    """Densify the factors of a Faust, the scale moved into the first."""

    def dense() -> list[np.ndarray]:
        factors = [faust.factors(i) for i in range(faust.numfactors())]
        factors = [np.asarray(f.todense() if hasattr(f, "todense") else f) for f in factors]
        return [factors[0] * scale, *factors[1:]]

    return dense


def palm4msa(W: np.ndarray, density: float, iterations: int = 300) -> Factors:
    """Two sparse factors, each with half of the budget; the square one on the shorter side."""
    fact, params = quietly("pyfaust.fact"), quietly("pyfaust.factparams")
    budget = int(density * W.size)
    half, (rows, columns) = budget // 2, W.shape
    inner = min(rows, columns)
    constraints = params.ConstraintList(
        "sp", half, rows, inner, "sp", budget - half, inner, columns
    )
    options = params.ParamsPalm4MSA(constraints, params.StoppingCriterion(num_its=iterations))
    with machine.silence():
        result = fact.palm4msa(np.asfortranarray(W), options, backend=_BACKEND)
    return faust_factors(result)


def hierarchical(W: np.ndarray, density: float) -> Factors:
    """Peel off one butterfly-sparse factor at a time, with pyfaust's setting for Hadamard."""
    fact = quietly("pyfaust.fact")
    with machine.silence():
        result = fact.hierarchical(np.asfortranarray(W), "hadamard", backend=_BACKEND)
    return faust_factors(result)


def faust_butterfly(W: np.ndarray, density: float) -> Factors:
    """Fit butterfly factors, after a bit reversal of the columns where the matrix is complex."""
    fact = quietly("pyfaust.fact")
    permutation = "bitrev" if np.iscomplexobj(W) else None
    with machine.silence():
        result = fact.butterfly(np.asfortranarray(W), type="bbtree", perm=permutation)
    return faust_factors(result)


def ksd_dyadic(W: np.ndarray, density: float) -> Factors:
    """Fit the same butterfly factors with lazylinop."""
    columns = bit_reversal(len(W)) if np.iscomplexobj(W) else np.arange(len(W))
    chain = quietly("lazylinop.butterfly").Chain.square_dyadic(W.shape)
    return ksd(np.ascontiguousarray(W[:, columns]), chain, columns)


def ksd_monarch(W: np.ndarray, density: float) -> Factors:
    """Fit two Kronecker-sparse factors that each take half of the budget."""
    p, q = monarch_blocks(W, density)
    chain = quietly("lazylinop.butterfly").Chain.monarch(W.shape, p=p, q=q)
    return ksd(W, chain, np.arange(W.shape[1]))


def ksd(W: np.ndarray, chain: Any, columns: np.ndarray) -> Factors:
    """Factorize ``W[:, columns]``, given, and undo the permutation in the last factor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = quietly("lazylinop.butterfly").ksd(W, chain)

    def dense() -> list[np.ndarray]:
        ksm = quietly("lazylinop.butterfly").ksm
        factors = [np.asarray(ksm(values).toarray()) for values in result.ks_values]
        return [*factors[:-1], factors[-1][:, np.argsort(columns)]]

    return dense


def bit_reversal(size: int) -> np.ndarray:
    """Return the permutation that reverses the bits of each index."""
    bits = size.bit_length() - 1
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(size)])


def monarch_blocks(W: np.ndarray, density: float) -> tuple[int, int]:
    """Return the parameters p and q of a Monarch chain, which stores ``1/p + q/columns``."""
    return round(2 / density), round(density * W.shape[1] / 2)


def suits_monarch(W: np.ndarray) -> bool:
    """Whether the blocks for a quarter of the entries divide the sides of `W`."""
    return np.isrealobj(W) and W.shape[0] % 8 == 0 and W.shape[1] % 8 == 0


def has_pyfaust() -> bool:
    """Whether pyfaust is there."""
    return machine.is_installed("pyfaust")


def has_lazylinop() -> bool:
    """Whether lazylinop is there with two packages that its butterflies need undeclared."""
    return all(map(machine.is_installed, ("lazylinop", "psutil", "pandas")))


PEERS = (
    Method(
        "pyfaust palm4msa", "double sparse", palm4msa, has_pyfaust,
        largest=800, sweep=("iterations", (10, 30, 100, 300)),
    ),
    Method("lazylinop ksd (Monarch)", "block", ksd_monarch, has_lazylinop, suits_monarch),
    Method("pyfaust hierarchical", "butterfly", hierarchical, has_pyfaust, is_hadamard, 256),
    Method("pyfaust butterfly", "butterfly", faust_butterfly, has_pyfaust, is_power_of_two),
    Method("lazylinop ksd (butterfly)", "butterfly", ksd_dyadic, has_lazylinop, is_power_of_two),
)  # fmt: skip
