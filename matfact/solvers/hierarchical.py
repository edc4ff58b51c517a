"""Hierarchical factorization: split off one factor at a time, then refine all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matfact.backend import Array
from matfact.constraints import Constraint
from matfact.solvers._callback import Callback
from matfact.solvers.palm import identity_start, is_exact, palm4msa

Side = Literal["left", "right"]


def hierarchical_palm4msa(
    W: Array,
    constraints: Sequence[Constraint],
    residual_constraints: Sequence[Constraint],
    *,
    side: Side = "right",
    max_iter: int = 100,
    tol: float = 1e-6,
    callback: Callback | None = None,
) -> tuple[list[Array], float, int]:
    """Approximate `W` by a product of factors, found one after the other.

    Each level splits what is left into a factor and a new residual by :func:`palm4msa`, then
    refines all factors found so far, with the residual, against `W`, unless their product is `W`
    already. Source: [1]_, Fig. 3.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix. Every factor is square on the shorter side, but for the one at the end of
        the longer side.
    constraints : sequence of Constraint
        One set for each factor, at least two.
    residual_constraints : sequence of Constraint
        The sets of the residuals, two fewer than the factors. From the left, entry `i` holds
        what stands for all factors after the `i`-th; from the right, what stands for the first
        ``i + 2`` factors.
    side : {"left", "right"}
        Which factor is split off first.
    max_iter : int
        Most sweeps of each split and of each refinement.
    tol : float
        As in :func:`palm4msa`.
    callback : callable, optional
        Called with the number of every sweep over all factors found so far, counted through, and
        the objective.

    Returns
    -------
    factors : list of array
        The factors.
    scale : float
        What their product is to be multiplied by; 1 if all sets allow factors to be scaled.
    n_iter : int
        Sweeps over all factors found so far.

    References
    ----------
    .. [1] L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices
       and applications", IEEE J. Sel. Topics Signal Process. 10(4), 2016.
    """
    factors: list[Array] = [W]
    sets: list[Constraint] = []
    scale, n_iter = 1.0, 0
    for level in range(1, len(constraints)):
        pair = _pair(constraints, residual_constraints, side, level)
        residual = factors.pop(0 if side == "right" else -1)
        sets = sets[1:] if side == "right" else sets[:-1]
        start, backward = identity_start(residual, pair, backward=side == "right")
        halves, split_scale, sweeps = palm4msa(
            residual, start, pair, max_iter=max_iter, tol=tol, backward=backward,
            callback=callback if level == 1 else None,
        )  # fmt: skip
        factors = [*halves, *factors] if side == "right" else [*factors, *halves]
        sets = [*pair, *sets] if side == "right" else [*sets, *pair]
        if level == 1:  # the first split has refined all there is
            scale, n_iter = split_scale, sweeps
        elif is_exact(W, factors):
            scale = 1.0
        else:
            factors, scale, sweeps = palm4msa(
                W, factors, sets, max_iter=max_iter, tol=tol, backward=backward,
                callback=_counted_from(n_iter, callback),
            )  # fmt: skip
            n_iter += sweeps
    return factors, scale, n_iter


def _pair(
    constraints: Sequence[Constraint],
    residual_constraints: Sequence[Constraint],
    side: Side,
    level: int,
) -> list[Constraint]:
    """Return the sets of the two halves the residual is split into, at `level` from 1."""
    is_last = level == len(constraints) - 1
    if side == "right":
        rest = constraints[0] if is_last else residual_constraints[-level]
        return [rest, constraints[-level]]
    rest = constraints[-1] if is_last else residual_constraints[level - 1]
    return [constraints[level - 1], rest]


def _counted_from(offset: int, callback: Callback | None) -> Callback | None:
    if callback is None:
        return None
    return lambda iteration, objective: callback(offset + iteration, objective)
