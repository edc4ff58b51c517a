"""Products of sparse factors by proximal alternating linearized minimization."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions

from matfact import backend, metrics
from matfact.backend import Array
from matfact.constraints import (
    ColumnSparsity,
    Constraint,
    FixedSupport,
    GlobalSparsity,
    MaxRank,
    RowColumnSparsity,
    RowSparsity,
    Support,
    resolve_constraint,
)
from matfact.factorizers._base import DENSITY, BaseFactorizer, Factorization
from matfact.factorizers._dsf import DoubleSparseFactorizer
from matfact.factorizers._validation import MOST_FACTORS, check_matrix
from matfact.operators import DenseFactor, Factor, FactorProduct, SparseFactor
from matfact.solvers._callback import History
from matfact.solvers.hierarchical import Side, hierarchical_palm4msa
from matfact.solvers.palm import identity_start, palm4msa

#: Budget of a square factor relative to an equal share. Best for square matrices at densities
#: from 0.1 to 0.5; divided by the square root of the aspect ratio for others.
SQUARE_SHARE = 0.8


class Palm4MSA(BaseFactorizer):
    """Product of any number of factors, each in its own constraint set.

    PALM4MSA stands for proximal alternating linearized minimization for multi-layer sparse
    approximation (Le Magoarou & Gribonval, 2016). Here the step size follows the local curvature
    and is at first longer than descent permits, which finds better supports. By default two sparse
    factors share the density.

    Parameters
    ----------
    density : float or None, default=None
        Upper bound on stored values ÷ entries of `W`, in (0, 1]. Each factor keeps its share of
        largest entries, wherever they are. None means 0.25, raised if needed to one value per
        factor (with more than two factors, to one per row or column of each). Must be None with
        `constraints`.
    n_factors : int, default=2
        Number of factors, at most 64. All are square, with the shorter side of `W`, except one
        that has the shape of `W`. One factor gives magnitude pruning. Ignored with
        `constraints`.
    constraints : sequence of Constraint or str, or None, default=None
        One constraint per factor, in the order of the product: any object of
        `matfact.constraints`, or the name of one without parameters. None means as many
        nonzeros as `density` allows. Required for complex `W`.
    residual_constraints : sequence of Constraint or str, or None, default=None
        Constraints on the residuals of the hierarchical algorithm, two fewer than `constraints`.
        With "left", entry `i` constrains the product of the factors after the `i`-th; with
        "right", that of the first ``i + 2``. None derives them from `constraints`.
    hierarchical : {"left", "right"} or None, default=None
        Split off one factor at a time, from this side, and refine all factors after each split,
        instead of fitting all at once. Recovers fast transforms exactly.
    init : {"dsf", "svd"}, FactorProduct, sequence of array or None, default=None
        Initial factors. "dsf" starts from the result of `DoubleSparseFactorizer` and
        usually gives the lowest error; "svd" starts from the singular value decomposition and is
        better still if `W` is of low rank up to noise (both for two factors). A product, such as
        ``operator_`` of a fitted factorizer, or a list of arrays is a warm start; its factors
        keep their shares of the budget if they fit. None starts from identities and the
        projection of `W`. Must be None with `hierarchical`.
    max_iter : int, default=100
        Maximum number of sweeps over the factors, for each split and each refinement.
    tol : float, default=1e-6
        Stop when a sweep reduces the objective by less than this fraction, once steps are short
        enough to descend.

    Attributes
    ----------
    operator_ : FactorProduct
        The product of the factors. Constraints that scaling breaks, such as unit-norm columns,
        hold up to one positive scalar per factor.
    factors_ : tuple of Factor
        Its factors.
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
        The objective may rise while steps are long; the best factors found are returned.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices
      and applications", IEEE J. Sel. Topics Signal Process. 10(4), 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import Palm4MSA
    >>> W = np.random.default_rng(0).standard_normal((32, 32))
    >>> model = Palm4MSA(density=0.5).fit(W)
    >>> model.nnz_, len(model.factors_), bool(model.normalized_err_ < 0.9)
    (512, 2, True)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "density": DENSITY,
        "n_factors": [Interval(Integral, 1, MOST_FACTORS, closed="both")],
        "constraints": ["array-like", None],
        "residual_constraints": ["array-like", None],
        "hierarchical": [StrOptions({"left", "right"}), None],
        "init": [StrOptions({"dsf", "svd"}), FactorProduct, list, tuple, None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        density: float | None = None,
        n_factors: int = 2,
        constraints: Sequence[Constraint | str] | None = None,
        residual_constraints: Sequence[Constraint | str] | None = None,
        hierarchical: Side | None = None,
        init: Literal["dsf", "svd"] | FactorProduct | Sequence[Any] | None = None,
        max_iter: int = 100,
        tol: float = 1e-6,
    ) -> None:
        self.density = density
        self.n_factors = n_factors
        self.constraints = constraints
        self.residual_constraints = residual_constraints
        self.hierarchical = hierarchical
        self.init = init
        self.max_iter = max_iter
        self.tol = tol

    @property
    def _allow_complex(self) -> bool:  # type: ignore[override]
        """Complex transforms have a known structure; the default is for real weights."""
        return self.constraints is not None

    def _factorize(self, W: Array, history: History) -> Factorization:
        if self.init is not None and self.hierarchical is not None:
            raise ValueError(f"init must be None with hierarchical={self.hierarchical!r}.")
        start = self._initial_factors(W)
        sets, shapes = self._sets(W, start)
        options: dict[str, Any] = {"max_iter": self.max_iter, "tol": self.tol, "callback": history}
        if self.hierarchical is not None and len(sets) > 1:
            residuals = self._residual_sets(sets, shapes)
            factors, scale, n_iter = hierarchical_palm4msa(
                W, sets, residuals, side=self.hierarchical, **options
            )
        else:
            backward = False
            if start is None:
                start, backward = identity_start(W, sets)
            factors, scale, n_iter = palm4msa(W, start, sets, backward=backward, **options)
        factors[0] = scale * factors[0]
        stored = [f for pair in zip(factors, sets, strict=True) for f in _stored(*pair)]
        return Factorization(stored, n_iter)

    def _initial_factors(self, W: Array) -> list[Array] | None:
        """Return the validated initial factors; None for identities."""
        init = self.init
        if isinstance(init, str):
            n_factors = self.n_factors if self.constraints is None else len(self.constraints)
            if n_factors != 2:
                raise ValueError(f"init={init!r} needs two factors, got {n_factors}.")
            return self._from_dsf(W) if init == "dsf" else list(MaxRank(min(W.shape)).factors(W))
        if init is None:
            return None
        xp = backend.namespace(W)
        start = []
        for i, given in enumerate(init):
            array = given.toarray() if isinstance(given, Factor) else given
            array = check_matrix(array, f"init[{i}]", allow_complex=self._allow_complex)
            if backend.namespace(array) is not xp:
                array = backend.like(backend.to_numpy(array), W)
            start.append(xp.astype(array, W.dtype))
        rows, columns = ([array.shape[axis] for array in start] for axis in (0, 1))
        if [*rows, W.shape[1]] != [W.shape[0], *columns]:
            raise ValueError(
                f"init must hold factors whose shapes chain to {tuple(W.shape)}, got "
                f"{[tuple(array.shape) for array in start]}."
            )
        return start

    def _from_dsf(self, W: Array) -> list[Array]:
        """Return a double sparse factorization with the same constraints."""
        if backend.namespace(W).isdtype(W.dtype, "complex floating"):
            raise ValueError(f"init='dsf' needs a real matrix, got {W.dtype}.")
        model = DoubleSparseFactorizer(self.density, constraints=self.constraints)
        return [factor.toarray() for factor in model._factorize(W, History()).factors]

    def _sets(
        self, W: Array, start: list[Array] | None
    ) -> tuple[list[Constraint], list[tuple[int, int]]]:
        """Return the constraint and the shape of every factor."""
        if self.constraints is None:
            n_factors = self.n_factors
        elif self.density is not None:
            raise ValueError(f"density must be None with constraints, got {self.density}.")
        else:
            sets = _resolve("constraints", self.constraints)
            n_factors = len(sets)
        if start is not None and len(start) != n_factors:
            raise ValueError(f"init must hold {n_factors} factors, got {len(start)}.")
        shapes = _shapes(W.shape, n_factors) if start is None else [a.shape for a in start]
        if self.constraints is None:
            least = metrics.least_chain(W.shape, n_factors)
            budget = metrics.stored_value_budget(self.density, W.shape, minimum=least)
            return _shares(budget, W.shape, n_factors, start), shapes
        for i, (constraint, shape) in enumerate(zip(sets, shapes, strict=True)):
            try:
                constraint.nnz(shape)
            except ValueError as error:
                raise ValueError(f"constraints[{i}]: {error}") from None
        return sets, shapes

    def _residual_sets(
        self, sets: list[Constraint], shapes: list[tuple[int, int]]
    ) -> list[Constraint]:
        """Return the constraints on the residuals of the hierarchical algorithm."""
        n_residuals = len(sets) - 2
        if self.residual_constraints is not None:
            residuals = _resolve("residual_constraints", self.residual_constraints)
            if len(residuals) != n_residuals:
                raise ValueError(
                    f"residual_constraints must hold {n_residuals} sets, two fewer than the "
                    f"factors, got {len(residuals)}."
                )
            return residuals
        if self.hierarchical == "right":
            parts = [slice(0, i + 2) for i in range(n_residuals)]
        else:
            parts = [slice(i + 1, None) for i in range(n_residuals)]
        return [_product_set(sets[part], shapes[part]) for part in parts]


def _resolve(name: str, sets: Sequence[Constraint | str]) -> list[Constraint]:
    """Return constraints as objects, looking up names."""
    resolved = [resolve_constraint(each, f"{name}[{i}]") for i, each in enumerate(sets)]
    if name == "constraints" and not resolved:
        raise ValueError("constraints must hold at least one set, got none.")
    return resolved


def _shapes(shape: tuple[int, int], n_factors: int) -> list[tuple[int, int]]:
    """Return the shapes of factors: square with the shorter side, except one."""
    side = min(shape)
    sizes = [shape[0], *[side] * (n_factors - 1), shape[1]]
    return list(itertools.pairwise(sizes))


def _shares(
    budget: int, shape: tuple[int, int], n_factors: int, start: list[Array] | None
) -> list[Constraint]:
    """Split the budget into sparsity constraints, in the shares of `start` if it fits."""
    stored = [max(1, int(np.count_nonzero(backend.to_numpy(array)))) for array in start or ()]
    if 0 < sum(stored) <= budget:
        rest = [budget * k // sum(stored) for k in stored[1:]]
        sizes = [budget - sum(rest), *rest]
    else:
        aspect = max(shape) / min(shape)
        least = 1 if n_factors <= 2 else min(*shape, (budget - 1) // (n_factors - 1))
        rest = [max(least, int(SQUARE_SHARE * budget / n_factors / aspect**0.5))] * (n_factors - 1)
        last = budget - sum(rest)
        sizes = [last, *rest] if shape[0] > shape[1] else [*rest, last]
    return [GlobalSparsity(k) for k in sizes]


def _product_set(sets: Sequence[Constraint], shapes: Sequence[tuple[int, int]]) -> Constraint:
    """Return the constraint on a residual that replaces the factors in `sets`."""
    supports = [constraint for constraint in sets if isinstance(constraint, Support)]
    if len(supports) == len(sets):
        masks = [support.mask(shape) for support, shape in zip(supports, shapes, strict=True)]
        return FixedSupport(functools.reduce(lambda a, b: a.astype(float) @ b > 0, masks))
    for kind in (RowSparsity, ColumnSparsity, RowColumnSparsity):
        counts = [constraint.k for constraint in sets if isinstance(constraint, kind)]
        if len(counts) == len(sets):
            return kind(math.prod(counts))
    stored = [constraint.nnz(shape) for constraint, shape in zip(sets, shapes, strict=True)]
    return GlobalSparsity(min(sum(stored), shapes[0][0] * shapes[-1][1]))


def _stored(factor: Array, constraint: Constraint) -> list[Factor]:
    """Return a factor in the storage format with the fewest values."""
    if isinstance(constraint, MaxRank) and constraint.nnz(factor.shape) < math.prod(factor.shape):
        return [DenseFactor(half) for half in constraint.factors(factor)]
    is_full = bool(backend.namespace(factor).all(factor != 0))
    return [DenseFactor(factor) if is_full else SparseFactor.from_dense(factor)]
