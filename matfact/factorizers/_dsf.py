"""Double sparse factorization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from sklearn.utils._param_validation import Interval, StrOptions

from matfact import backend, metrics
from matfact.backend import Array
from matfact.constraints import (
    Constraint,
    GlobalSparsity,
    Sparsity,
    Support,
    resolve_constraint,
    transposed,
)
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._validation import MOST_FACTORS
from matfact.operators import SparseFactor
from matfact.solvers._callback import History
from matfact.solvers.dsf import dsf, pruned, thin
from matfact.solvers.palm import identity_start, palm4msa
from matfact.solvers.sparse_product import sparse_product

#: Error relative to that of pruning above which another attempt is made.
POOR = 0.82
#: Largest relative error at which low rank is tried.
NEARLY_EXACT = 0.1


class DoubleSparseFactorizer(BaseFactorizer):
    """Product of two sparse matrices, ``W ≈ A B``, or of more.

    Double sparse factorization (Boža & Macko, 2025) alternates sparse regressions by ADMM.
    Penalties and numbers of nonzeros follow a schedule that finds better supports in fewer sweeps.
    Nonzeros may be anywhere, which makes this the most accurate factorization for a given number of
    values.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values of all factors ÷ entries of `W`, in (0, 1]. None means 0.25,
        raised if needed to two values (with more than two factors, to one per row or column of
        each).
    first_factor_density : float or "auto", default="auto"
        Nonzeros of `A` ÷ its entries, in (0, 1]; `B` gets the rest of the budget. "auto" splits
        the budget in proportion to the square root of the factors' lengths, so equally for a
        square `W`.
    constraints : sequence of Constraint, str or None, of length 2, or None, default=None
        Where `A` and `B` may be nonzero: any sparsity or support of `matfact.constraints`,
        such as ``NMSparsity(2, 4)``, ``BlockSparsity(k)``, ``RowSparsity(k)`` or
        ``FixedSupport.random(shape, k, seed)``, or the name of one without parameters. A factor
        with None is unstructured and gets the part of `density` that the other leaves: at least
        one value per row and column, and better half as many values as the other. With two
        constraints, `density` must be None.
    n_factors : int, default=2
        Number of factors, at most 64. Factors beyond two are split off one at a time and all are
        refined together by the solver of `Palm4MSA`; `first_factor_density` and
        `constraints` must then keep their defaults. More than two factors rarely lower the error.
    max_iter : int, default=100
        Number of sweeps over both factors. The schedule stretches over them, so more sweeps find
        better supports: 400 lower the error by about 5 %, 25 raise it by about 10 %.

    Attributes
    ----------
    operator_ : FactorProduct
        The product of the factors. Inner dimensions equal the shorter side of `W`.
    factors_ : tuple of Factor
        `A` and `B`, or all factors if there are more.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Number of sweeps over all factors.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, one entry per iteration.
        The objective may rise while the schedule searches for supports. A final refit of the
        values, not recorded here, lowers it again.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - V. Boža, V. Macko, "Two sparse matrices are better than one: sparsifying neural
      networks with double sparse factorization", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import DoubleSparseFactorizer
    >>> W = np.random.default_rng(0).standard_normal((64, 64))
    >>> model = DoubleSparseFactorizer(density=0.25).fit(W)
    >>> model.nnz_, bool(model.normalized_err_ < 0.75)
    (1024, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "first_factor_density": [Interval(Real, 0, 1, closed="right"), StrOptions({"auto"})],
        "constraints": [list, tuple, None],
        "n_factors": [Interval(Integral, 2, MOST_FACTORS, closed="both")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        density: float | None = None,
        first_factor_density: float | Literal["auto"] = "auto",
        constraints: Sequence[Constraint | str | None] | None = None,
        n_factors: int = 2,
        max_iter: int = 100,
    ) -> None:
        self.density = density
        self.first_factor_density = first_factor_density
        self.constraints = constraints
        self.n_factors = n_factors
        self.max_iter = max_iter

    @property
    def has_free_support(self) -> bool:
        """Whether refits may choose the entries of the output-side factor again."""
        return self.constraints is None

    def _factorize(self, W: Array, history: History) -> Factorization:
        xp = backend.namespace(W)
        if self.n_factors > 2:
            return self._factorize_more(W, history)
        if self.constraints is None:
            sets = self._budgets(W.shape)
        else:
            sets = self._sets(W.shape, self.constraints)
        tall = W.shape[0] > W.shape[1]
        if tall:  # the solver expects the square factor first
            W = xp.matrix_transpose(W)
            sets = [transposed(constraint) for constraint in reversed(sets)]
        *found, n_iter = dsf(W, *sets, max_iter=self.max_iter, callback=history)
        found = self._best(W, found, sets) if self.constraints is None else _better(W, found, sets)
        factors = [xp.matrix_transpose(f) for f in reversed(found)] if tall else found
        return Factorization([SparseFactor.from_dense(f) for f in factors], n_iter)

    def _factorize_more(self, W: Array, history: History) -> Factorization:
        """Factorize `W` into more than two factors."""
        for name, default in (("first_factor_density", "auto"), ("constraints", None)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} must be {default!r} with n_factors={self.n_factors}, got "
                    f"{getattr(self, name)!r}."
                )
        short, long = sorted(W.shape)
        budget = metrics.stored_value_budget(
            self.density, W.shape, minimum=metrics.least_chain(W.shape, self.n_factors)
        )
        n_square = self.n_factors - 1
        weight = math.sqrt(short) / (n_square * math.sqrt(short) + math.sqrt(long))
        square = min(max(1, round(budget * weight)), (budget - 1) // n_square, short * short)
        nonzeros = [square] * n_square + [min(budget - n_square * square, short * long)]
        transpose = backend.namespace(W).matrix_transpose
        tall = W.shape[0] > W.shape[1]
        factors, n_iter = sparse_product(
            transpose(W) if tall else W, nonzeros, max_iter=self.max_iter, callback=history
        )
        factors = [transpose(factor) for factor in reversed(factors)] if tall else factors
        return Factorization([SparseFactor.from_dense(factor) for factor in factors], n_iter)

    def _best(self, W: Array, found: list[Array], sets: Sequence[Constraint]) -> list[Array]:
        """Return the best of ADMM, pruning, PALM and low rank.

        Regressions that start from the identity fail on fast transforms, whose entries have equal
        magnitude; there the gradient steps of PALM are better. On matrices of low rank they leave
        a small error, whatever the number of sweeps, where thin dense factors are exact.
        """

        def error(factors: Sequence[Array]) -> float:
            return backend.norm(W - backend.namespace(W).matmul(*factors))

        shapes = [factor.shape for factor in found]
        budget = sum(c.nnz(shape) for c, shape in zip(sets, shapes, strict=True))
        candidates = [found, list(pruned(W, budget))]
        errors = [error(candidate) for candidate in candidates]
        if errors[0] > POOR * errors[1]:
            start, backward = identity_start(W, sets)
            factors, scale, _ = palm4msa(W, start, sets, max_iter=self.max_iter, backward=backward)
            candidates.append([scale * factors[0], factors[1]])
            errors.append(error(candidates[-1]))
        if 0.0 < errors[0] <= NEARLY_EXACT * backend.norm(W):
            candidates.append(thin(W, *(c.nnz(s) for c, s in zip(sets, shapes, strict=True))))
            errors.append(error(candidates[-1]))
        return candidates[errors.index(min(errors))]

    def _sets(self, shape: tuple[int, int], given: Sequence[Any]) -> list[Constraint]:
        """Return the constraints, with the rest of the budget for a factor without one."""
        side = min(shape)
        shapes = (shape[0], side), (side, shape[1])
        if len(given) != 2:
            raise ValueError(f"constraints must hold two sets, got {len(given)}.")
        if self.first_factor_density != "auto":
            raise ValueError(
                "first_factor_density must be 'auto' with constraints, got "
                f"{self.first_factor_density}."
            )
        chosen = {i: _resolve(c, i, shapes[i]) for i, c in enumerate(given) if c is not None}
        if len(chosen) == 1:
            ((i, constraint),) = chosen.items()
            left = self._left(shape, constraint.nnz(shapes[i]), max(shapes[1 - i]))
            chosen[1 - i] = GlobalSparsity(min(left, math.prod(shapes[1 - i])))
        elif not chosen:
            raise ValueError("constraints must hold a set, got only None.")
        elif self.density is not None:
            raise ValueError(f"density must be None with two constraints, got {self.density}.")
        return [chosen[0], chosen[1]]

    def _left(self, shape: tuple[int, int], stored: int, needed: int) -> int:
        """Return the number of values left to the unstructured factor, if they are enough."""
        budget, size = metrics.stored_value_budget(self.density, shape), math.prod(shape)
        if budget - stored >= needed:
            return budget - stored
        asked = f"density={self.density}" + (", which means 0.25," if self.density is None else "")
        least, good = (math.ceil(1e4 * n / size) / 1e4 for n in (stored + needed, 1.5 * stored))
        advice = f"a density of at least {least:g}, better {min(1.0, max(least, good)):g}"
        raise metrics.DensityTooSmall(
            f"{asked} allows {budget} stored values for a "
            f"{shape[0]}×{shape[1]} matrix, but the constrained factor takes {stored} and the "
            f"other needs {needed}, one for each row and column: choose "
            f"{advice if least <= 1.0 else 'a constraint that leaves more'}."
        )

    def _budgets(self, shape: tuple[int, int]) -> list[Constraint]:
        """Return the numbers of nonzeros of `A` and `B`."""
        rows, columns = shape
        side = min(rows, columns)
        budget = metrics.stored_value_budget(self.density, shape, minimum=2)
        if self.first_factor_density == "auto":
            weights = math.sqrt(rows), math.sqrt(columns)
            first = round(budget * weights[0] / sum(weights))
        else:
            first = metrics.part_of(rows * side, self.first_factor_density)
            if not 1 <= first < budget:
                raise ValueError(
                    f"first_factor_density must give the {rows}×{side} first factor at least 1 "
                    f"and fewer than {budget} nonzeros (what density={self.density} allows), "
                    f"got {self.first_factor_density}, which gives {first}."
                )
        first = min(max(first, 1, budget - side * columns), rows * side, budget - 1)
        return [GlobalSparsity(first), GlobalSparsity(budget - first)]


def _better(W: Array, found: list[Array], sets: Sequence[Constraint]) -> list[Array]:
    """Return the factors, or one constrained factor and an identity if that is closer to `W`.

    The identity must be allowed by the other factor's constraint.
    """
    xp = backend.namespace(W)
    best, error = found, backend.norm(W - xp.matmul(*found))
    for free, (factor, constraint) in enumerate(zip(found, sets, strict=True)):
        side, other = factor.shape[0], 1 - free
        holds = isinstance(constraint, GlobalSparsity) and constraint.k >= side == factor.shape[1]
        if holds and found[other].shape == W.shape:
            alone = sets[other].project(W)
            if (lost := backend.norm(W - alone)) < error:
                eye = xp.eye(side, dtype=W.dtype, device=backend.device(W))
                best, error = ([alone, eye] if free else [eye, alone]), lost
    return best


def _resolve(constraint: Constraint | str, i: int, shape: tuple[int, int]) -> Constraint:
    """Return the `i`-th constraint as an object, checked against a factor of `shape`."""
    label = f"constraints[{i}]"
    constraint = resolve_constraint(constraint, label)
    if not isinstance(constraint, (Sparsity, Support)):
        raise ValueError(f"{label} must be a sparsity or a support, got {constraint}.")
    try:
        constraint.nnz(shape)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return constraint
