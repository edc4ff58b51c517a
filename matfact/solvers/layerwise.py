"""What a layer should be, and pruning it, with regard to its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.constraints import Constraint, transposed
from matfact.operators import FactorProduct
from matfact.solvers._callback import Callback
from matfact.solvers.admm import DAMPING, SparseState, sparse_regression
from matfact.solvers.least_squares import damped_gram, refit_values

#: Penalty of the first and of the last ADMM step; geometric in between.
PENALTIES = (0.1, 1.0)
#: Conjugate gradient steps on the values once the support is found.
REFIT_STEPS = 20
#: Damping without validation ÷ (number of inputs ÷ number of samples), and its bounds. It is least
#: squares with noise, of which there is the more the fewer samples there are for each input.
NOISE, LEAST_DAMPING, LARGEST_DAMPING = 2.0, 0.1, 1.0
#: Share of the root mean square of the norms of inputs that is added to each, in squares.
RARE = 0.1
#: Changes of outputs below this share of them are rounding.
ROUNDING = 1e-12
#: Least norm of an input relative to the largest, so that weights of dead inputs are pruned
#: first, and in the order of their magnitude.
LEAST_NORM = 1e-6


def input_norms(gram: Array) -> Array:
    """Return the norm of each input over all samples, relative to the largest.

    Parameters
    ----------
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs.

    Returns
    -------
    array of shape (columns,)
        In [1e-6, 1]; 1 where all inputs are zero.
    """
    xp = backend.namespace(gram)
    squares = xp.linalg.diagonal(gram)
    largest = xp.max(squares)
    if float(largest) <= 0.0:
        return xp.ones_like(squares)
    return xp.clip(xp.sqrt(squares / largest), LEAST_NORM, None)


def corrected(W: Array, wanted: OutputStatistics, *, damping: float | None = None) -> Array:
    """Return the matrix near `W` whose outputs come nearest to those that are wanted.

    With ``U`` the outputs wanted of the inputs ``X``, such as those that `W` had before its inputs
    changed, it minimizes ``‖U − X Ŵᵀ‖_F² + damping · ‖(W − Ŵ) D‖_F²`` over `Ŵ`, `D` the norms of
    the inputs, each raised by a share of their root mean square.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    wanted : OutputStatistics
        Those of `X` and `U`.
    damping : float, optional
        Larger values keep the result closer to `W`. By default it grows from 0.1 to 1 as the
        number of samples per input shrinks.

    Returns
    -------
    array of shape (rows, columns)
        `Ŵ`, in the dtype of `W`.
    """
    damping = caution(wanted.inputs) if damping is None else damping
    return next(corrections(W, wanted, [damping]))


def caution(inputs: InputStatistics) -> float:
    """Return a damping for least squares by these inputs where no others can tell a better one."""
    noise = NOISE * inputs.n_features / inputs.count
    return min(max(noise, LEAST_DAMPING), LARGEST_DAMPING)


def corrections(W: Array, wanted: OutputStatistics, dampings: Sequence[float]) -> Iterator[Array]:
    """Yield what :func:`corrected` returns for each of `dampings`."""
    xp = backend.namespace(W)
    gram, wide = wanted.inputs.gram, backend.wide(xp.matrix_transpose(W))
    norms = _absolute_norms(gram)
    rare = RARE * backend.norm(norms) / math.sqrt(norms.shape[0])
    norms = xp.sqrt(norms**2 + rare**2)  # of inputs that few samples know, little is learned
    # Xᵀ(U − X Wᵀ), a slab of inputs at a time
    change = xp.empty(wide.shape, dtype=wide.dtype, device=backend.device(wide))
    for rows in backend.slabs(gram.shape[0]):
        change[rows, :] = wanted.cross[rows, :] - xp.matmul(gram[rows, :], wide)
    del wide  # memory, as below
    if backend.norm(change) <= ROUNDING * backend.norm(wanted.cross):
        change = xp.zeros_like(change)
    change /= norms[:, None]
    for damping in dampings:
        damped = damped_gram(gram, norms, damping, gram.dtype)
        correction = backend.spd_solve(damped, xp.asarray(change, copy=True))
        del damped
        correction /= norms[:, None]
        # In C order, of which no fit makes a copy.
        yield backend.contiguous(W + xp.astype(xp.matrix_transpose(correction), W.dtype))
        del correction


def admm_prune(
    W: Array,
    gram: Array,
    constraint: Constraint,
    *,
    damping: float = 0.0,
    max_iter: int = 40,
    callback: Callback | None = None,
) -> Array:
    """Lower ``‖X (W − Ŵ)ᵀ‖_F²`` over `Ŵ` in a set of sparse matrices.

    Source: [1]_, with inputs scaled to unit norm. What differs is that the number of nonzeros
    stays as it is while the penalty grows, so that supports change freely at first and then
    settle, and that the values are refit in the end.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision.
    constraint : Constraint
        Set of `Ŵ`, a sparsity or a support.
    damping : float
        What is added to the diagonal of the Gram matrix of inputs of unit norm, which pulls
        `Ŵ` to `W`.
    max_iter : int
        Number of ADMM steps.
    callback : callable, optional
        Called with the number of every step and the squared error of the outputs, damping
        included, relative to the energy of the outputs.

    Returns
    -------
    array of shape (rows, columns)
        `Ŵ`, zero off its support; never worse than what magnitude pruning or Wanda keep with
        their values refit in the same way.

    References
    ----------
    .. [1] V. Boža, "Fast and effective weight update for pruned large language models", TMLR,
       2024.
    """
    xp = backend.namespace(W)
    norms = input_norms(gram)
    gram = damped_gram(gram, _absolute_norms(gram), damping, W.dtype)
    weights = xp.astype(norms, W.dtype)
    # Columns are the outputs, each a regression on the inputs.
    target = backend.contiguous(xp.matrix_transpose(W * weights))
    cross = xp.matmul(gram, target)
    energy = float(xp.sum(target * cross)) or 1.0

    def error(X: Array) -> float:
        difference = target - X
        return float(xp.sum(difference * xp.matmul(gram, difference))) / energy

    def refit(start: SparseState) -> Array:
        X = start.solution
        return refit_values(gram, cross - xp.matmul(gram, X), X, start.support, REFIT_STEPS)

    rule = transposed(constraint)
    magnitude = SparseState(target, xp.matrix_transpose(constraint.support(W)))
    wanda = SparseState(target, rule.support(target))
    state = SparseState(xp.asarray(target, copy=True), wanda.support)
    pulled = cross + DAMPING * target  # what the solver adds to the Gram matrix, added here too
    for step, penalty in enumerate(np.geomspace(*PENALTIES, max_iter), start=1):
        state = sparse_regression(gram, pulled, state, rule, [float(penalty)])
        if callback is not None:
            callback(step, error(state.solution))
    del pulled  # memory
    found = min(map(refit, (state, wanda, magnitude)), key=error)
    return xp.matrix_transpose(found) / weights


def _absolute_norms(gram: Array) -> Array:
    """Return the norm of each input, not much smaller than the largest, and 1 if all are 0."""
    largest = backend.max_abs(backend.namespace(gram).linalg.diagonal(gram))
    return input_norms(gram) * math.sqrt(largest if largest > 0.0 else 1.0)


def squared_error(W: Array, product: FactorProduct, metric: Array | None) -> float:
    """Return ``tr (W − Ŵ) H (W − Ŵ)ᵀ``, with the identity for `H` where there is no metric."""
    difference = W - product.astype(W.dtype).toarray()
    moved = difference if metric is None else backend.namespace(W).matmul(difference, metric)
    return backend.inner(moved, difference)
