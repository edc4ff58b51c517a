"""Correction and pruning of a layer's weights given its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.constraints import Constraint, transposed
from matfact.solvers._callback import Callback
from matfact.solvers.admm import DAMPING, SparseState, sparse_regression
from matfact.solvers.least_squares import damped_gram, refit_values

#: Penalty of the first and last ADMM step; geometric in between.
PENALTIES = (0.1, 1.0)
#: Conjugate gradient steps on the values once the support is found.
REFIT_STEPS = 20
#: Damping without validation ÷ (number of inputs ÷ number of samples), and its bounds. Fewer
#: samples per input mean more noise in the least-squares fit.
NOISE, LEAST_DAMPING, LARGEST_DAMPING = 2.0, 0.1, 1.0
#: Share of the mean square of the input norms that is added to each squared norm.
RARE = 0.1
#: Relative changes of outputs below this are rounding.
ROUNDING = 1e-12
#: Minimum norm of an input relative to the largest, so that weights of dead inputs are pruned
#: first, in the order of their magnitude.
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
    """Return the weights near `W` that best give the target outputs.

    Let ``U`` be the target outputs for the inputs ``X``, for example those of `W` before its inputs
    changed. Minimizes ``‖U − X Ŵᵀ‖_F² + damping · ‖(W − Ŵ) D‖_F²`` over `Ŵ`, with `D` the norms of
    the inputs, each raised by a share of their root mean square.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    wanted : OutputStatistics
        Statistics of `X` and `U`.
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
    """Return the default damping, for use without validation inputs."""
    noise = NOISE * inputs.n_features / inputs.count
    return min(max(noise, LEAST_DAMPING), LARGEST_DAMPING)


def corrections(W: Array, wanted: OutputStatistics, dampings: Sequence[float]) -> Iterator[Array]:
    """Yield the result of `corrected` for each of `dampings`."""
    xp = backend.namespace(W)
    gram, wide = wanted.inputs.gram, backend.wide(xp.matrix_transpose(W))
    norms = _absolute_norms(gram)
    rare = RARE * backend.norm(norms) / math.sqrt(norms.shape[0])
    norms = xp.sqrt(norms**2 + rare**2)  # learn little about inputs with few samples
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
        # In C order, which fits do not copy.
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
    """Minimize ``‖X (W − Ŵ)ᵀ‖_F²`` over `Ŵ` in a set of sparse matrices, by ADMM.

    Source: Boža (2024), with inputs scaled to unit norm. Unlike there, the number of nonzeros is
    fixed and the penalty grows, so that supports change freely at first and then settle. The values
    are refit at the end.

    Parameters
    ----------
    W : array of shape (rows, columns)
        Weights.
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision.
    constraint : Constraint
        Constraint on `Ŵ`, a sparsity or a support.
    damping : float
        Added to the diagonal of the Gram matrix of inputs of unit norm; pulls `Ŵ` towards `W`.
    max_iter : int
        Number of ADMM steps.
    callback : callable, optional
        Called with the number of every step and the relative squared error of the outputs,
        including damping.

    Returns
    -------
    array of shape (rows, columns)
        `Ŵ`, zero off its support; never worse than magnitude pruning or Wanda with values refit in
        the same way.

    References
    ----------
    - V. Boža, "Fast and effective weight update for pruned large language models", TMLR,
      2024.
    """
    xp = backend.namespace(W)
    norms = input_norms(gram)
    gram = damped_gram(gram, _absolute_norms(gram), damping, W.dtype)
    weights = xp.astype(norms, W.dtype)
    # Each column is an output, a regression on the inputs.
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
    pulled = cross + DAMPING * target  # as the solver adds DAMPING to the Gram matrix
    for step, penalty in enumerate(np.geomspace(*PENALTIES, max_iter), start=1):
        state = sparse_regression(gram, pulled, state, rule, [float(penalty)])
        if callback is not None:
            callback(step, error(state.solution))
    del pulled  # memory
    found = min(map(refit, (state, wanda, magnitude)), key=error)
    return xp.matrix_transpose(found) / weights


def _absolute_norms(gram: Array) -> Array:
    """Return the norm of each input, bounded below relative to the largest; 1 if all are 0."""
    largest = backend.max_abs(backend.namespace(gram).linalg.diagonal(gram))
    return input_norms(gram) * math.sqrt(largest if largest > 0.0 else 1.0)


def squared_error(difference: Array, metric: Array | None) -> float:
    """Return ``tr D H Dᵀ`` of a difference `D`, `H` the metric or else the identity."""
    return float(backend.inner(in_metric(difference, metric), difference))


def in_metric(M: Array, metric: Array | None) -> Array:
    """Return `M` times the metric, itself where there is none."""
    return M if metric is None else backend.namespace(M).matmul(M, metric)
