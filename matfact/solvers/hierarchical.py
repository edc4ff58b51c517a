"""Hierarchical factorization: split off one factor at a time, refining all after each split."""

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
    """Approximate `W` by a product of factors, split off one after the other.

    Each level splits the residual into a factor and a new residual by `palm4msa`, then
    refines all factors and the residual against `W`, unless their product is already exact.
    Source: Le Magoarou & Gribonval (2016), Fig. 3.

    Parameters
    ----------
    W : array of shape (rows, columns)
        The matrix. Factors are square with the shorter side, except the one at the longer side.
    constraints : sequence of Constraint
        One constraint per factor, at least two.
    residual_constraints : sequence of Constraint
        Constraints on the residuals, two fewer than the factors. With "left", entry `i` constrains
        the product of the factors after the `i`-th; with "right", that of the first ``i + 2``.
    side : {"left", "right"}
        Side at which factors are split off.
    max_iter : int
        Maximum number of sweeps of each split and each refinement.
    tol : float
        As in `palm4msa`.
    callback : callable, optional
        Called with the running number of every sweep over all factors found so far, and the
        objective.

    Returns
    -------
    factors : list of array
        The factors.
    scale : float
        Scalar to multiply the product by; 1 if all constraints allow scaling.
    n_iter : int
        Number of sweeps over all factors found so far.

    References
    ----------
    - L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices
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
        if level == 1:  # the first split has already refined everything
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
    """Return the constraints on the two parts of the residual at `level`, from 1."""
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
