"""Block-wise low rank: singular triples of all blocks share one budget (Liu et al.)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.solvers.svd import whitening_root

Ranking = Literal["energy", "magnitude", "relative_error", "output_perturbation", "output_variance"]

#: Maximum number of strips per side, and minimum length of a strip, in the search for a blocking.
_MAX_STRIPS, _MIN_STRIP = 16, 8


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Grid of nearly equal blocks of a matrix.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns of the matrix.
    grid : tuple of int
        Number of row strips and column strips.
    """

    shape: tuple[int, int]
    grid: tuple[int, int]

    @property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """First row, end row, first column and end column of each block (ends are exclusive)."""
        rows, columns = (
            [n * i // parts for i in range(parts + 1)]
            for n, parts in zip(self.shape, self.grid, strict=True)
        )
        return [
            (r0, r1, c0, c1)
            for r0, r1 in itertools.pairwise(rows)
            for c0, c1 in itertools.pairwise(columns)
        ]

    @property
    def costs(self) -> np.ndarray:
        """Stored values of one triple in each block."""
        return np.asarray([r1 - r0 + c1 - c0 for r0, r1, c0, c1 in self.spans])

    def cut(self, W: Array) -> list[Array]:
        """Return the blocks of `W`, row strip after row strip."""
        return [W[r0:r1, c0:c1] for r0, r1, c0, c1 in self.spans]


def square_grid(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the grid of the largest nearly square blocks (Liu et al., Sec. 3.2.2)."""
    rows, columns = shape
    return (max(1, round(rows / columns)), max(1, round(columns / rows)))


def candidate_blockings(shape: tuple[int, int]) -> list[Blocking]:
    """Return the blockings to try for a matrix of `shape`, starting with the whole matrix."""
    strips = [
        [1, *(2**i for i in range(1, 1 + int(math.log2(_MAX_STRIPS))) if n >= _MIN_STRIP * 2**i)]
        for n in shape
    ]
    grids = [(a, b) for a in strips[0] for b in strips[1]]
    square = square_grid(shape)
    return [Blocking(shape, grid) for grid in dict.fromkeys([*grids, square])]


def select_triples(
    scores: Sequence[np.ndarray], costs: np.ndarray, budget: int
) -> list[np.ndarray]:
    """Select triples by one ranking over all blocks, best first, until the budget is used.

    Parameters
    ----------
    scores : sequence of ndarray
        Importance of each triple, block by block. Triples with score 0 are not kept.
    costs : ndarray of shape (n_blocks,)
        Stored values of one triple in each block.
    budget : int
        Maximum number of stored values, at least the smallest cost.

    Returns
    -------
    list of ndarray of int
        Positions of the triples to keep in each block; at least one triple is kept overall.
    """
    lengths = [len(s) for s in scores]
    block_of = np.repeat(np.arange(len(scores)), lengths)
    flat, cost = np.concatenate(scores), costs[block_of]
    keep = np.zeros(flat.size, dtype=bool)
    cheapest = costs.min()
    for i in np.argsort(-flat, kind="stable"):
        if flat[i] <= 0.0 or budget < cheapest:
            break
        if cost[i] <= budget:
            keep[i] = True
            budget -= cost[i]
    if not keep.any():
        keep[np.argmin(cost)] = True
    return [np.flatnonzero(part) for part in np.split(keep, np.cumsum(lengths)[:-1])]


def energy_scores(spectra: Sequence[np.ndarray], costs: np.ndarray) -> list[np.ndarray]:
    """Return the squared error saved by each triple per stored value, from the singular values.

    Values within rounding of 0 score 0.
    """
    floor = max(s[0] for s in spectra) * costs.max() * np.finfo(spectra[0].dtype).eps
    return [np.where(s > floor, s, 0.0) ** 2 / c for s, c in zip(spectra, costs, strict=True)]


def _plain_scores(
    spectra: Sequence[np.ndarray], costs: np.ndarray, ranking: Ranking
) -> list[np.ndarray]:
    """Return the score of each triple from singular values alone."""
    scores = energy_scores(spectra, costs)
    if ranking in ("magnitude", "relative_error"):  # same order: they differ by a constant
        return [np.sqrt(score * cost) for score, cost in zip(scores, costs, strict=True)]
    return scores


def blocking_error(
    W: Array,
    blocking: Blocking,
    budget: int,
    ranking: Ranking = "energy",
    calibration: InputStatistics | None = None,
) -> float:
    """Return the error of `block_svd` with the same arguments.

    Without calibration it is ``‖W − Ŵ‖_F² / ‖W‖_F²``, from singular values alone; with it, the
    squared layer error.
    """
    if calibration is not None:
        factors = block_svd(W, blocking, budget, ranking, calibration)
        return metrics.layer_error(W, reconstruct(factors, blocking), calibration.gram) ** 2
    xp = backend.namespace(W)
    spectra = _batched(blocking.cut(W), lambda stack: [xp.linalg.svdvals(stack)])
    values = [backend.to_numpy(s) for (s,) in spectra]
    kept = select_triples(_plain_scores(values, blocking.costs, ranking), blocking.costs, budget)
    energies = [v.astype(np.float64) ** 2 for v in values]
    total = sum(e.sum() for e in energies)
    lost = sum(np.delete(e, k).sum() for e, k in zip(energies, kept, strict=True))
    return float(lost / total) if total else 0.0


def block_svd(
    W: Array,
    blocking: Blocking,
    budget: int,
    ranking: Ranking = "energy",
    calibration: InputStatistics | None = None,
) -> list[tuple[Array, Array]]:
    """Approximate each block of `W` by the product of two factors.

    Parameters
    ----------
    W : array of shape (out_features, in_features)
        Finite real matrix.
    blocking : Blocking
        The grid of blocks.
    budget : int
        Maximum number of stored values, at least those of one triple.
    ranking : {"energy", "magnitude", "relative_error", "output_perturbation", "output_variance"}
        How triples are ranked. The last two need `calibration`: the mean square and the variance of
        the triple's contribution to the outputs, in closed form
        ``σ² E(vᵀx)²`` and ``σ² Var(vᵀx)`` for one layer (Liu et al., Sec. 4).
    calibration : InputStatistics, optional
        With it, ``"energy"`` uses the directions in which a block's outputs have most energy
        instead of the block's singular vectors.

    Returns
    -------
    list of (left, right)
        Arrays of shapes (p, r) and (r, q) for a block of p×q; r may be 0.
    """
    xp = backend.namespace(W)
    blocks = blocking.cut(W)
    data_ranking = ranking in ("output_perturbation", "output_variance")
    targets = blocks
    if calibration is not None and ranking == "energy":
        moments = _moments(blocking, calibration.second_moment)
        roots = {span: whitening_root(moment) for span, moment in moments.items()}
        targets = [
            xp.matmul(backend.wide(block), roots[span[2:]])
            for block, span in zip(blocks, blocking.spans, strict=True)
        ]
    pairs = _batched(targets, lambda stack: xp.linalg.svd(stack, full_matrices=False)[:2])
    bases = [xp.astype(U, W.dtype) for U, _ in pairs]
    spectra = [backend.to_numpy(s) for _, s in pairs]
    scores = _plain_scores(spectra, blocking.costs, ranking)
    if data_ranking and calibration is not None:
        average = ranking == "output_perturbation"
        moment = calibration.second_moment if average else calibration.covariance
        scores = _data_scores(blocks, bases, blocking, moment)
    kept = select_triples(scores, blocking.costs, budget)
    return [
        _factors(block, xp.take(U, backend.like(k, W), axis=1))
        for block, U, k in zip(blocks, bases, kept, strict=True)
    ]


def keep_triples(
    W: Array, blocking: Blocking, kept: Sequence[np.ndarray]
) -> list[tuple[Array, Array]]:
    """Return two factors per block of `W`, from its singular triples at positions `kept`."""
    xp = backend.namespace(W)
    blocks = blocking.cut(W)
    pairs = _batched(blocks, lambda stack: xp.linalg.svd(stack, full_matrices=False)[:1])
    return [
        _factors(block, xp.take(U, backend.like(np.asarray(k, dtype=np.int64), W), axis=1))
        for block, (U,), k in zip(blocks, pairs, kept, strict=True)
    ]


def reconstruct(factors: Sequence[tuple[Array, Array]], blocking: Blocking) -> Array:
    """Return the matrix of the products of `factors`."""
    xp = backend.namespace(factors[0][0])
    blocks = [xp.matmul(left, right) for left, right in factors]
    width = blocking.grid[1]
    strips = [xp.concat(blocks[i : i + width], axis=1) for i in range(0, len(blocks), width)]
    return xp.concat(strips, axis=0)


def _batched(
    blocks: list[Array], function: Callable[[Array], Sequence[Array]]
) -> list[tuple[Array, ...]]:
    """Apply a function of stacked matrices to `blocks`, grouped by shape."""
    xp = backend.namespace(blocks[0])
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, block in enumerate(blocks):
        same[tuple(block.shape)].append(i)
    results: dict[int, tuple[Array, ...]] = {}
    for members in same.values():
        outputs = function(xp.stack([blocks[i] for i in members]))
        results |= {i: tuple(out[j, ...] for out in outputs) for j, i in enumerate(members)}
    return [results[i] for i in range(len(blocks))]


def _moments(blocking: Blocking, moment: Array) -> dict[tuple[int, int], Array]:
    """Return the diagonal block of `moment` for each column strip."""
    return {(c0, c1): moment[c0:c1, c0:c1] for _, _, c0, c1 in blocking.spans}


def _data_scores(
    blocks: list[Array], bases: list[Array], blocking: Blocking, moment: Array
) -> list[np.ndarray]:
    """Return ``σ² vᵀ M v`` for each triple, with the `moment` M of the block's inputs."""
    xp = backend.namespace(moment)
    moments = _moments(blocking, moment)
    scores = []
    for block, U, span in zip(blocks, bases, blocking.spans, strict=True):
        right = backend.wide(xp.matmul(xp.matrix_transpose(U), block))
        energy = xp.sum(xp.matmul(right, moments[span[2:]]) * right, axis=1)
        scores.append(backend.to_numpy(energy))
    return scores


def _factors(block: Array, basis: Array) -> tuple[Array, Array]:
    """Return `block` projected on an orthonormal `basis`, as balanced factors."""
    xp = backend.namespace(block)
    right = xp.matmul(xp.matrix_transpose(basis), block)
    sizes = xp.sqrt(xp.linalg.vector_norm(right, axis=1))
    sizes = xp.where(sizes > 0.0, sizes, 1.0)
    return basis * sizes, right / sizes[:, None]
