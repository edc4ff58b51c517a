"""Block-wise truncated SVD under one budget."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, get_args

import numpy as np
from sklearn.utils._param_validation import StrOptions

from matfact import backend, metrics
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._chain import Layout
from matfact.operators import BlockSparseFactor
from matfact.solvers._callback import History
from matfact.solvers.block_svd import (
    Blocking,
    Ranking,
    block_svd,
    blocking_error,
    candidate_blockings,
    square_grid,
)
from matfact.solvers.grouping import low_rank_groups

_DATA_RANKINGS = ("output_perturbation", "output_variance")


class BlockSVD(BaseFactorizer):
    """Block-wise truncated SVD, with ranks chosen under one budget.

    `W` is cut into a grid of blocks, and the singular triples of all blocks are ranked together,
    so that more important blocks get a higher rank (Liu et al., 2022). With
    ``fit(W, calibration=X)`` the error of the outputs is minimized instead.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. None means 0.25, raised if
        needed to one triple (of the whole matrix with ``blocking="auto"``).
    blocking : {"auto", "whole", "strips", "square"} or tuple of two int, default="auto"
        How to cut `W`: "whole" not at all, "strips" into four column strips, "square" into the
        largest nearly square blocks, and a tuple into that many row and column strips. "auto"
        tries grids up to 16×16 and keeps the best. These include the whole matrix, so the error
        is at most that of `LowRank`.
    ranking : {"energy", "magnitude", "relative_error", "output_perturbation", \
"output_variance"}, default="energy"
        How to rank the triples. "energy", the squared error saved per stored value (of the
        outputs, with calibration inputs), gives the smallest errors. The others come from Liu et
        al. (2022) and use the plain singular triples: "magnitude" is the singular value;
        "relative_error" divides it by the norm of `W`, which does not change the order within a
        single matrix; "output_perturbation" and "output_variance" are the mean square and the
        variance of the triple's contribution to the outputs, and need calibration inputs. For
        several layers see `matfact.allocation.rank_triples`.
    permute : bool, default=False
        Whether to permute rows and columns so that the blocks are closer to low rank. This takes
        seconds for a thousand rows and helps if related rows and columns are scattered.
        Permutations do not count as stored values.

    Attributes
    ----------
    operator_ : FactorProduct
        The product of two block-sparse factors, holding the left and right singular vectors, and
        of any permutations.
    factors_ : tuple of Factor
        Its factors.
    blocking_ : tuple of int
        Number of row strips and column strips.
    ranks_ : ndarray of shape `blocking_`
        Rank of each block.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    layer_err_ : float
        ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for the calibration inputs `X`; only with calibration.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Number of blockings tried.
    history_ : dict of list
        ``objective`` (squared relative error, or squared layer error with calibration) and
        ``seconds``, one entry per blocking.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - Y. Liu, S. Joshi, B. Mirzasoleiman, "Low rank pruning via output perturbation", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import BlockSVD
    >>> W = np.kron(np.eye(2), np.ones((8, 8)))
    >>> model = BlockSVD(density=0.125, blocking=(2, 2)).fit(W)
    >>> model.ranks_
    array([[1, 0],
           [0, 1]])
    >>> bool(model.reconstruction_err_ < 1e-14)
    True
    """

    _side_power = 2.5
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "blocking": [StrOptions({"auto", "whole", "strips", "square"}), tuple],
        "ranking": [StrOptions(set(get_args(Ranking)))],
        "permute": ["boolean"],
    }

    def __init__(
        self,
        density: float | None = None,
        blocking: str | tuple[int, int] = "auto",
        ranking: Ranking = "energy",
        permute: bool = False,
    ) -> None:
        self.density = density
        self.blocking = blocking
        self.ranking = ranking
        self.permute = permute

    def _factorize(self, W: Array, history: History) -> Factorization:
        if self.ranking in _DATA_RANKINGS:
            raise ValueError(
                f"ranking={self.ranking!r} needs calibration inputs: pass them to fit or choose "
                "'energy'."
            )
        return self._solve(W, history, None)

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        return self._solve(W, history, calibration)

    def _solve(
        self, W: Array, history: History, calibration: InputStatistics | None
    ) -> Factorization:
        blockings = self._blockings(W.shape)
        cheapest = [int(blocking.costs.min()) for blocking in blockings]
        minimum = cheapest[0] if self.density is None else min(cheapest)
        budget = metrics.stored_value_budget(self.density, W.shape, minimum=minimum)
        blockings = [b for b in blockings if b.costs.min() <= budget]
        layouts = [self._layout(W, blocking, budget) for blocking in blockings]
        cases = [
            (layout.arrange(W), blocking, budget, self.ranking, _reordered(calibration, layout))
            for layout, blocking in zip(layouts, blockings, strict=True)
        ]
        errors = []
        for i, case in enumerate(cases):
            errors.append(blocking_error(*case))
            history(i + 1, errors[-1])
        # The simplest of the blockings that differ only by rounding.
        tolerance = 100 * float(backend.namespace(W).finfo(W.dtype).eps)
        chosen = int(np.argmax(np.asarray(errors) <= min(errors) + tolerance))
        best = blockings[chosen]
        factors = block_svd(*cases[chosen])
        self.blocking_ = best.grid
        self.ranks_ = np.asarray([left.shape[1] for left, _ in factors]).reshape(best.grid)
        placed = layouts[chosen].around(block_factors(factors, best, W))
        return Factorization(placed, len(blockings))

    def _layout(self, W: Array, blocking: Blocking, budget: int) -> Layout:
        """Return the row and column orders to cut."""
        rows, columns = (
            np.split(np.arange(n), [n * i // parts for i in range(1, parts)])
            for n, parts in zip(W.shape, blocking.grid, strict=True)
        )
        if self.permute:
            rank = max(1, budget // int(blocking.costs.sum()))
            rows, columns = low_rank_groups(backend.to_numpy(W), rows, columns, rank)
        return Layout.permuted(W, np.concatenate(rows), np.concatenate(columns))

    def _blockings(self, shape: tuple[int, int]) -> list[Blocking]:
        """Return the blockings to try."""
        if self.blocking == "auto":
            return candidate_blockings(shape)
        strips = (1, min(4, shape[1]))  # four strips, as in Liu et al.
        named = {"whole": (1, 1), "strips": strips, "square": square_grid(shape)}
        grid = named[self.blocking] if isinstance(self.blocking, str) else self.blocking
        fits = len(grid) == 2 and all(
            isinstance(parts, Integral) and 1 <= parts <= n
            for parts, n in zip(grid, shape, strict=False)
        )
        if not fits:
            raise ValueError(
                "blocking must be a name or a tuple of two int, between 1 and "
                f"{shape[0]} row strips and 1 and {shape[1]} column strips, got {grid!r}."
            )
        return [Blocking(shape, (int(grid[0]), int(grid[1])))]


def _reordered(calibration: InputStatistics | None, layout: Layout) -> InputStatistics | None:
    """Return the input statistics in the order of `layout`."""
    return None if calibration is None else calibration.reordered(layout.columns.index)


def block_factors(
    factors: list[tuple[Array, Array]], blocking: Blocking, W: Array
) -> list[BlockSparseFactor]:
    """Return the left and right factors of all blocks as two block-sparse factors."""
    ends = np.cumsum([left.shape[1] for left, _ in factors])
    placed = [
        (left, right, span, int(end) - left.shape[1])
        for (left, right), span, end in zip(factors, blocking.spans, ends, strict=True)
        if left.shape[1]
    ]
    return [
        BlockSparseFactor.from_blocks(
            [left for left, _, _, _ in placed],
            [(span[0], start) for _, _, span, start in placed],
            (W.shape[0], int(ends[-1])),
            like=W,
        ),
        BlockSparseFactor.from_blocks(
            [right for _, right, _, _ in placed],
            [(start, span[2]) for _, _, span, start in placed],
            (int(ends[-1]), W.shape[1]),
            like=W,
        ),
    ]
