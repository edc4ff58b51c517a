"""Grouping of rows and columns into blocks of low rank."""

from __future__ import annotations

import numpy as np
import scipy.optimize
from sklearn.cluster import KMeans

from matfact._threads import single_threaded

Groups = list[np.ndarray]

_MAX_ITER = 20
_TOLERANCE = 1e-4  #: relative gain in captured energy below which to stop
_DECIMALS = {"f": 3, "d": 6}  #: significant decimals of numbers near one
_BALANCING = 5  #: iterations that fit clusters into groups of fixed sizes


def low_rank_groups(
    W: np.ndarray, rows: Groups, columns: Groups, rank: int
) -> tuple[Groups, Groups]:
    """Group rows and columns so that the blocks are closer to a given rank.

    Alternates between rows and columns. Each row is assigned to the group whose leading singular
    vectors capture most of its energy, with fixed group sizes (an assignment problem); then the
    vectors are recomputed. The captured energy never decreases. Since this ends in local optima, it
    starts both from the given groups and from clusters of rows with similar magnitude profiles: in
    a block of rank one, rows are multiples of each other. Liu et al. (open questions) suggest
    clustering outputs; the method is new.

    Parameters
    ----------
    W : ndarray of shape (n_rows, n_columns)
        Real or complex.
    rows, columns : list of ndarray of int
        Initial groups, which together hold each row (column) once.
    rank : int
        Rank of a block.

    Returns
    -------
    rows, columns : list of ndarray of int
        Groups of the same sizes; the given ones if none are better.
    """
    starts = [(rows, columns), (_clusters(W, rows), _clusters(W.T, columns))]
    found = [_improved(W, *start, rank) for start in starts]
    return max(found, key=lambda result: result[0])[1:]


def _improved(
    W: np.ndarray, rows: Groups, columns: Groups, rank: int
) -> tuple[float, Groups, Groups]:
    """Return the energy captured by blocks of a given rank, and the improved groups."""
    total = float(np.linalg.norm(W)) ** 2
    bases, energy = _bases(W, rows, columns, rank)
    best = (energy, rows, columns)
    for _ in range(_MAX_ITER):
        rows = assign(_captured(W, columns, bases), rows)
        bases, _ = _bases(W.T, columns, rows, rank)
        columns = assign(_captured(W.T, rows, bases), columns)
        bases, energy = _bases(W, rows, columns, rank)
        if energy <= best[0] + _TOLERANCE * total:
            break
        best = (energy, rows, columns)
    return best


def _bases(
    W: np.ndarray, rows: Groups, columns: Groups, rank: int
) -> tuple[list[list[np.ndarray]], float]:
    """Return the leading right singular vectors of each block, and the captured energy."""
    bases, energy = [], 0.0
    for group in rows:
        parts = [np.linalg.svd(W[np.ix_(group, c)], full_matrices=False)[1:] for c in columns]
        energy += sum(float((s[:rank] ** 2).sum()) for s, _ in parts)
        bases.append([Vh[:rank] for _, Vh in parts])
    return bases, energy


def _captured(W: np.ndarray, columns: Groups, bases: list[list[np.ndarray]]) -> np.ndarray:
    """Return the energy of each row of `W` captured by the vectors of each group."""
    return np.stack(
        [
            sum(
                (np.abs(W[:, c] @ Vh.conj().T) ** 2).sum(1)
                for c, Vh in zip(columns, group, strict=True)
            )
            for group in bases
        ],
        axis=1,
    )


def assign(scores: np.ndarray, groups: Groups) -> Groups:
    """Return groups with the sizes of `groups` and the largest sum of scores."""
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    _, places = scipy.optimize.linear_sum_assignment(scores[:, owners], maximize=True)
    return [np.flatnonzero(owners[places] == k) for k in range(len(groups))]


def _clusters(W: np.ndarray, groups: Groups) -> Groups:
    """Return groups of rows with similar magnitude profiles."""
    if len(groups) == 1:
        return groups
    magnitudes = np.abs(W)
    profiles = np.log(magnitudes + 1e-3 * magnitudes.mean() + np.finfo(W.dtype).tiny)
    profiles -= profiles.mean(0) + profiles.mean(1, keepdims=True) - profiles.mean()
    U, s, _ = np.linalg.svd(profiles, full_matrices=False)
    features = U[:, : len(groups)] * s[: len(groups)]
    centers = centers_of(features, len(groups))
    if centers is None:
        return groups
    for _ in range(_BALANCING):
        groups = assign(-distances(features, centers), groups)
        centers = np.stack([features[group].mean(0) for group in groups])
    return groups


def centers_of(points: np.ndarray, count: int) -> np.ndarray | None:
    """Return cluster centers, or None if too few points differ by more than rounding."""
    points = points.astype(np.float64).round(_DECIMALS[points.dtype.char])
    if np.unique(points, axis=0).shape[0] < count:
        return None
    with single_threaded():  # its threads sum in any order, and wait for each other
        return KMeans(count, n_init=8, random_state=0).fit(points).cluster_centers_


def distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return squared distances of points from centers."""
    return (points**2).sum(1)[:, None] - 2 * points @ centers.T + (centers**2).sum(1)
