"""Allocation of singular triples of several matrices under one budget (Liu et al.; ALDS)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.utils import check_random_state

from matfact.backend import Array
from matfact.factorizers._block_svd import block_factors
from matfact.operators import FactorProduct
from matfact.solvers.block_svd import Blocking, keep_triples, select_triples

#: Numbers of strips of all layers in the first searches, as in the ALDS paper.
_FIRST_STRIPS = (3, 5, 7, 9)


def magnitude_scores(spectra: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Score each triple of a matrix by its singular value.

    Scores of different layers are not comparable, since their scales are arbitrary.

    Parameters
    ----------
    spectra : sequence of ndarray
        Singular values of each block of the matrix.

    Returns
    -------
    list of ndarray
        A score for each triple of each block.
    """
    return [np.asarray(s, dtype=float) for s in spectra]


def relative_error_scores(spectra: Sequence[np.ndarray], norm: float) -> list[np.ndarray]:
    """Score each triple by the relative operator-norm error without it.

    Parameters
    ----------
    spectra : sequence of ndarray
        Singular values of each block, descending.
    norm : float
        Largest singular value of the whole matrix.

    Returns
    -------
    list of ndarray
        Error of a block truncated before each triple, divided by `norm`.
    """
    return [np.asarray(s, dtype=float) / norm if norm else np.zeros(len(s)) for s in spectra]


def rank_triples(
    scores: Mapping[str, Sequence[np.ndarray]],
    costs: Mapping[str, np.ndarray],
    budget: int,
    *,
    per_value: bool = False,
) -> dict[str, list[np.ndarray]]:
    """Select the best triples of all blocks of all matrices by one ranking.

    Parameters
    ----------
    scores : mapping of str to sequence of ndarray
        For each matrix, the importance of each triple of each block. Triples with score 0 are not
        kept. Scores of different matrices are compared directly.
    costs : mapping of str to ndarray
        For each matrix, the stored values of a triple of each block: rows + columns.
    budget : int
        Maximum total number of stored values, at least that of the cheapest triple.
    per_value : bool, default=False
        Whether to rank triples by score ÷ cost.

    Returns
    -------
    dict of str to list of ndarray of int
        Positions of the triples to keep in each block. Check for matrices without any triple, which
        disconnect the network.

    Raises
    ------
    ValueError
        If names or numbers of blocks of `scores` and `costs` differ, a score is not finite, or the
        budget is too small for a triple.

    References
    ----------
    - Y. Liu, S. Joshi, B. Mirzasoleiman, "Low rank pruning via output perturbation", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.allocation import rank_triples
    >>> scores = {"first": [np.array([5.0, 2.0])], "last": [np.array([4.0, 3.0])]}
    >>> costs = {"first": np.array([10]), "last": np.array([6])}
    >>> {name: list(blocks[0]) for name, blocks in rank_triples(scores, costs, 22).items()}
    {'first': [np.int64(0)], 'last': [np.int64(0), np.int64(1)]}
    """
    lengths = {name: len(blocks) for name, blocks in scores.items()}
    if lengths != {name: len(c) for name, c in costs.items()}:
        raise ValueError(f"costs must hold one value for each block of scores, {lengths}.")
    _check_finite(scores, "scores")
    every = np.concatenate([np.asarray(costs[name]) for name in scores])
    if budget < every.min():
        raise ValueError(f"budget must be at least {every.min()}, one triple, got {budget}.")
    blocks = [np.asarray(block, dtype=float) for name in scores for block in scores[name]]
    if per_value:
        blocks = [block / cost for block, cost in zip(blocks, every, strict=True)]
    kept = iter(select_triples(blocks, every, budget))
    return {name: [next(kept) for _ in range(n)] for name, n in lengths.items()}


def truncated_blocks(
    W: Array, kept: Sequence[np.ndarray], grid: tuple[int, int] = (1, 1)
) -> FactorProduct:
    """Return the product with the selected singular triples of each block of a matrix.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        The matrix, real and finite.
    kept : sequence of array-like of int
        Positions of the triples in each block, from `rank_triples`.
    grid : tuple of int, default=(1, 1)
        Numbers of row strips and column strips.

    Returns
    -------
    FactorProduct
        Two block-sparse factors.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.allocation import truncated_blocks
    >>> truncated_blocks(np.diag([3.0, 2.0, 1.0]), [[0, 2]]).toarray().round(12) + 0.0
    array([[3., 0., 0.],
           [0., 0., 0.],
           [0., 0., 1.]])
    """
    blocking = Blocking((int(W.shape[0]), int(W.shape[1])), grid)
    factors = keep_triples(W, blocking, [np.asarray(k, dtype=np.int64) for k in kept])
    return FactorProduct(block_factors(factors, blocking, W))


@dataclasses.dataclass(frozen=True)
class StripRanks:
    """Strips and rank of a layer in ALDS.

    Attributes
    ----------
    strips : int
        Number of column strips.
    rank : int
        Rank of each strip.
    """

    strips: int
    rank: int


def strip_spectra(W: np.ndarray, strips: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the relative operator-norm errors of `W` cut into column strips.

    Parameters
    ----------
    W : ndarray of shape (out_features, in_features)
        The matrix.
    strips : sequence of int
        Numbers of strips to try; they must divide in_features.

    Returns
    -------
    dict of int to ndarray
        For each number k, the error ``max_b σ_{j+1}(W_b) / σ_1(W)`` with strips of rank j = 0, 1,
        ….
    """
    rows, columns = W.shape
    largest = float(np.linalg.norm(W, 2)) or 1.0
    errors = {}
    for k in strips:
        if columns % k:
            raise ValueError(f"strips must divide the {columns} columns of W, got {k}.")
        blocks = W.reshape(rows, k, columns // k).swapaxes(0, 1)
        spectrum = np.linalg.svdvals(blocks).max(axis=0) / largest
        errors[k] = np.append(spectrum, 0.0)
    return errors


def alds_ranks(
    errors: Mapping[str, Mapping[int, np.ndarray]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    *,
    n_starts: int = 15,
    n_rounds: int = 4,
    random_state: int | np.random.RandomState | None = 0,
) -> tuple[dict[str, StripRanks], float]:
    """Choose strips and ranks of all layers to minimize the largest relative error.

    Two steps alternate, from several starts (Liebenwein et al., 2021): given the numbers of strips,
    bisection finds the smallest error that fits the budget; given the resulting budget of each
    layer, the number of strips with the smallest error is chosen.

    Parameters
    ----------
    errors : mapping of str to mapping of int to ndarray
        For each layer and number of strips, the errors of rank 0, 1, …: see
        `strip_spectra`.
    shapes : mapping of str to tuple of int
        out_features and in_features of each layer. A rank costs ``k · out + in`` values.
    budget : int
        Maximum total number of stored values.
    n_starts : int, default=15
        Number of starts: 3, 5, 7 and 9 strips (or the nearest possible), and random ones.
    n_rounds : int, default=4
        Alternations from each start.
    random_state : int, RandomState or None, default=0
        Seed of the random starts.

    Returns
    -------
    ranks : dict of str to StripRanks
        Strips of each layer and their rank, at least 1.
    error : float
        The largest relative error of a layer.

    Raises
    ------
    ValueError
        If the budget is too small for rank one everywhere, or an error is not finite.

    References
    ----------
    - L. Liebenwein, A. Maalouf, O. Gal, D. Feldman, D. Rus, "Compressing neural networks:
      towards determining the optimal layer-wise decomposition", NeurIPS 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.allocation import alds_ranks, strip_spectra
    >>> layers = {"easy": np.diag([9.0, 0.1, 0.1, 0.1]), "hard": np.eye(4)}
    >>> errors = {name: strip_spectra(W, [1]) for name, W in layers.items()}
    >>> shapes = {name: W.shape for name, W in layers.items()}
    >>> ranks, error = alds_ranks(errors, shapes, budget=40)
    >>> {name: r.rank for name, r in ranks.items()}, round(error, 3)
    ({'easy': 1, 'hard': 4}, 0.011)
    """
    _check_finite({name: list(curves.values()) for name, curves in errors.items()}, "errors")
    rng = check_random_state(random_state)
    least = sum(min(_cost(k, shapes[name]) for k in options) for name, options in errors.items())
    if budget < least:
        raise ValueError(f"budget must be at least {least}, rank one everywhere, got {budget}.")
    best: tuple[dict[str, StripRanks], float] | None = None
    for start in range(n_starts):
        strips = _start(errors, start, rng)
        for _ in range(n_rounds):
            found = _bisect(errors, shapes, strips, budget)
            if found is None:  # too many strips: use the cheapest
                strips = {name: min(options) for name, options in errors.items()}
                continue
            if best is None or found[1] < best[1]:
                best = found
            strips = {
                name: _best_strips(errors[name], shapes[name], ranks)
                for name, ranks in found[0].items()
            }
    if best is None:
        best = _bisect(errors, shapes, {n: min(options) for n, options in errors.items()}, budget)
    assert best is not None  # rank one fits
    return best


def _check_finite(found: Mapping[str, Sequence[np.ndarray]], what: str) -> None:
    """Raise ``ValueError`` for values of a layer that cannot be ranked."""
    for name, blocks in found.items():
        if not all(np.isfinite(block).all() for block in blocks):
            raise ValueError(f"{what} must be finite, but those of {name!r} are not.")


def _cost(strips: int, shape: tuple[int, int]) -> int:
    """Return the stored values of one more rank of each strip."""
    return strips * shape[0] + shape[1]


def _start(
    errors: Mapping[str, Mapping[int, np.ndarray]], start: int, rng: np.random.RandomState
) -> dict[str, int]:
    """Return the initial numbers of strips."""
    if start < len(_FIRST_STRIPS):
        wanted = _FIRST_STRIPS[start]
        return {
            name: min(options, key=lambda k: abs(k - wanted)) for name, options in errors.items()
        }
    return {name: int(rng.choice(list(options))) for name, options in errors.items()}


def _bisect(
    errors: Mapping[str, Mapping[int, np.ndarray]],
    shapes: Mapping[str, tuple[int, int]],
    strips: Mapping[str, int],
    budget: int,
) -> tuple[dict[str, StripRanks], float] | None:
    """Return the ranks that minimize the largest error for these strips, or None."""
    curves = {name: errors[name][k] for name, k in strips.items()}
    levels = np.unique(np.concatenate(list(curves.values())))

    def ranks(level: float) -> dict[str, int]:
        # Errors descend: take the first of at most `level`, with rank at least one.
        return {n: max(1, int(np.argmax(curve <= level))) for n, curve in curves.items()}

    def fits(level: float) -> bool:
        return sum(r * _cost(strips[n], shapes[n]) for n, r in ranks(level).items()) <= budget

    low, high = 0, len(levels) - 1
    if not fits(levels[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels[middle]) else (middle + 1, high)
    chosen = ranks(levels[low])
    error = max(float(curves[name][rank]) for name, rank in chosen.items())
    return {name: StripRanks(strips[name], rank) for name, rank in chosen.items()}, error


def _best_strips(
    options: Mapping[int, np.ndarray], shape: tuple[int, int], ranks: StripRanks
) -> int:
    """Return the number of strips with the smallest error at the cost of `ranks` or less."""
    stored = ranks.rank * _cost(ranks.strips, shape)

    def error(k: int) -> float:
        rank = min(stored // _cost(k, shape), len(options[k]) - 1)
        return float(options[k][rank]) if rank else np.inf

    return min(options, key=error)
