"""Products of three or more sparse matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matfact.backend import Array
from matfact.constraints import GlobalSparsity
from matfact.solvers._callback import Callback
from matfact.solvers.dsf import dsf
from matfact.solvers.palm import palm4msa


def sparse_product(
    W: Array, nonzeros: Sequence[int], *, max_iter: int = 100, callback: Callback | None = None
) -> tuple[list[Array], int]:
    """Approximate `W` by a product of sparse matrices.

    Double sparse factorization splits off one factor at a time from the left; the remainder keeps
    the nonzeros of all later factors. Proximal gradient steps then refine all factors together.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Finite real matrix with no more rows than columns.
    nonzeros : sequence of int
        Maximum number of nonzeros of each factor, at least 1. All factors but the last are square.
    max_iter : int
        Number of sweeps of each split, and maximum number of sweeps of the refinement.
    callback : callable, optional
        Called with the number of every sweep of the refinement and ``‖W − F_1 F_2 …‖_F²``.

    Returns
    -------
    factors : list of array
        The factors; their product is no worse than the zero matrix.
    n_iter : int
        Number of sweeps over all factors.
    """
    factors, rest = [], W
    for i, count in enumerate(nonzeros[:-1]):
        remaining = min(sum(nonzeros[i + 1 :]), math.prod(W.shape))
        left, rest, _ = dsf(
            rest, GlobalSparsity(count), GlobalSparsity(remaining), max_iter=max_iter
        )
        factors.append(left)
    sets = [GlobalSparsity(count) for count in nonzeros]
    factors, scale, n_iter = palm4msa(
        W, [*factors, rest], sets, max_iter=max_iter, callback=callback
    )
    return [scale * factors[0], *factors[1:]], n_iter
