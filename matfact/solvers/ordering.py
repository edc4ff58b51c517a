"""Column orders in which a matrix is close to a butterfly."""

from __future__ import annotations

import numpy as np

from matfact.solvers.chains import Chain
from matfact.solvers.grouping import assign, centers_of, distances

_MAX_ITER = 20
#: Rows per block, and total numbers, that describe a column for clustering.
_ROWS, _FEATURES = 16, 4096


def learned_order(W: np.ndarray, chain: Chain) -> np.ndarray:
    """Return an order of the columns of `W` in which it is closer to a product of `chain`.

    The first cut splits the columns into groups such that the rows of each block have low rank
    within each group. Columns of a group have parallel entries in each block, so columns are first
    clustered by direction. Then each column is reassigned to the group whose singular vectors
    capture most of its energy, in turns with updates of the vectors. The remainder is cut again,
    group by group, as in the identification of the factors. This recovers a planted order, up to
    orders that keep a butterfly a butterfly, but finds nothing in random columns.

    Parameters
    ----------
    W : ndarray of shape ``chain.shape``
        Real or complex.
    chain : Chain
        Supports of the factors.
    """
    blocks = [(np.arange(W.shape[1]), W)]
    cuts = zip(chain.patterns[:-1], chain.column_radices, chain.ranks, strict=False)
    for (_, rows, _, d), radix, rank in cuts:
        blocks = [
            part
            for columns, rest in blocks
            for part in _split(columns, rest.reshape(rows, d, -1), radix, rank)
        ]
    return np.concatenate([columns for columns, _ in blocks])


def _split(
    columns: np.ndarray, Z: np.ndarray, radix: int, rank: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split `columns` into groups; return them with the remainder of their rows.

    `Z` has shape (rows, d, columns): `d` blocks side by side.
    """
    groups = np.split(np.arange(Z.shape[2]), radix)
    if radix > 1:
        starts = [groups, _clusters(Z, groups)]
        groups = max((_improved(Z, s, rank) for s in starts), key=lambda found: found[0])[1]
    return [
        (columns[group], _held(Z[:, :, group], U).reshape(rank * Z.shape[1], -1))
        for group, U in zip(groups, _vectors(Z, groups, rank), strict=True)
    ]


def _improved(Z: np.ndarray, groups: list[np.ndarray], rank: int) -> tuple[float, list[np.ndarray]]:
    """Alternate between vectors and groups; return the captured energy and the groups."""
    best = (-1.0, groups)
    for _ in range(_MAX_ITER):
        vectors = _vectors(Z, groups, rank)
        scores = np.stack([(np.abs(_held(Z, U)) ** 2).sum((0, 1)) for U in vectors], axis=1)
        energy = sum(float(scores[group, k].sum()) for k, group in enumerate(groups))
        if energy <= best[0] * (1 + 1e-6):
            break
        best = (energy, groups)
        groups = assign(scores, groups)
    return best


def _vectors(Z: np.ndarray, groups: list[np.ndarray], rank: int) -> list[np.ndarray]:
    """Return the leading left singular vectors of each block, of shape (d, rows, rank)."""
    result = []
    for group in groups:
        blocks = np.moveaxis(Z[:, :, group], 1, 0)
        _, U = np.linalg.eigh(blocks @ blocks.conj().swapaxes(1, 2))
        result.append(U[:, :, : -rank - 1 : -1])
    return result


def _held(Z: np.ndarray, U: np.ndarray) -> np.ndarray:
    """Return the coefficients of the columns, of shape (rank, d, columns)."""
    return np.moveaxis(U.conj().swapaxes(1, 2) @ np.moveaxis(Z, 1, 0), 1, 0)


def _clusters(Z: np.ndarray, groups: list[np.ndarray]) -> list[np.ndarray]:
    """Return groups of columns with similar directions in the blocks."""
    Z = Z[:: -(-Z.shape[0] // _ROWS)]
    rows, d, _ = Z.shape
    Z = Z[:, :: -(-rows * rows * d // _FEATURES)]
    sizes = np.linalg.norm(Z, axis=0)
    Z = Z / np.where(sizes > 0.0, sizes, 1.0)
    projectors = Z[:, None] * Z[None, :].conj() * sizes  # invariant to the column's sign or phase
    features = projectors.reshape(-1, Z.shape[2]).T
    features = np.concatenate([features.real, features.imag], axis=1)
    centers = centers_of(features, len(groups))
    if centers is None:
        return groups
    return assign(-distances(features, centers), groups)
