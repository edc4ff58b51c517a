"""Weights settled input by input, what each loses made up for by the inputs that follow.

The sweep of GPTQ (Frantar et al., 2023) and SparseGPT (Frantar & Alistarh, 2023), in the equal form
that needs no inverse (LDLQ) (Chee et al., 2023).

References
----------
- E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate post-training quantization
  for generative pre-trained transformers", ICLR 2023.
- E. Frantar, D. Alistarh, "SparseGPT: Massive language models can be accurately pruned in
  one-shot", ICML 2023.
- J. Chee, Y. Cai, V. Kuleshov, C. De Sa, "QuIP: 2-bit quantization of large language models
  with guarantees", NeurIPS 2023.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from matfact import backend
from matfact.backend import Array

#: Damping by which the next attempt starts where a Gram matrix is singular, and by which it ends.
LEAST_DAMPING, LARGEST_DAMPING = 1e-8, 100.0
#: Squared error of an input, given those before, below which it is rounding; × inputs × epsilon.
SINGULAR = 8.0
#: What weights of dead inputs are multiplied by.
DEAD = 1e-6

#: Returns what the weights of an input become, from its place and its weights as they are now.
Settle = Callable[[int, Array], Array]


@dataclasses.dataclass(frozen=True)
class Feedback:
    """A damped Gram matrix ``(I + C) D (I + C)ᵀ`` over its mean diagonal.

    Parameters
    ----------
    coefficients : array of shape (columns, columns)
        `C`, zero on the diagonal and below. Its column `j` says which part of the error of each
        input before is made up for by input `j`.
    weights : array of shape (columns,)
        `D`: how much the squared error of an input counts that no other makes up for.
    """

    coefficients: Array
    weights: Array

    def astype(self, dtype: Any) -> Self:
        """Return the same in another dtype."""
        arrays = self.coefficients, self.weights
        return type(self)(*(backend.namespace(a).astype(a, dtype, copy=False) for a in arrays))


def feedback(gram: Array, damping: float) -> Feedback:
    """Decompose a Gram matrix, damped as by `damped_factor`."""
    xp = backend.namespace(gram)
    _, factor = damped_factor(xp.flip(gram, axis=(0, 1)), damping)
    upper = xp.flip(factor, axis=(0, 1))  # upper · upperᵀ is the damped Gram matrix
    roots = xp.linalg.diagonal(upper)
    return Feedback(backend.add_diagonal(xp.triu(upper) / roots[None, :], -1.0), roots**2)


def damped_factor(gram: Array, damping: float) -> tuple[Array, Array]:
    """Return a Gram matrix over its mean diagonal, with damping added, and its Cholesky factor.

    Parameters
    ----------
    gram : array of shape (columns, columns)
        ``XᵀX`` of the inputs, in double precision. Where all are zero it counts as the identity.
    damping : float
        What is added to the diagonal. Where the matrix stays singular to working precision, it is
        raised tenfold.

    Returns
    -------
    damped, factor : array of shape (columns, columns)
        The factor is lower triangular.
    """
    xp = backend.namespace(gram)
    mean = float(xp.mean(xp.linalg.diagonal(gram)))
    if mean > 0:
        gram = gram / mean
    else:
        gram, damping = xp.zeros_like(gram), 1.0
    least = SINGULAR * gram.shape[0] * float(xp.finfo(gram.dtype).eps)
    while damping <= LARGEST_DAMPING:
        damped = backend.add_diagonal(gram, damping)
        factor = _cholesky(damped)
        if factor is not None and float(xp.min(xp.linalg.diagonal(factor))) ** 2 > least:
            return damped, factor
        damping = max(10 * damping, LEAST_DAMPING)
    raise ValueError("calibration must hold inputs whose Gram matrix is positive semidefinite.")


def live_inputs(gram: Array) -> Array:
    """Return 1 for each input, and next to nothing for those that are always zero.

    Multiplied with it, weights of dead inputs are pruned first, in the order of their magnitude,
    whatever the damping.
    """
    xp = backend.namespace(gram)
    diagonal = xp.linalg.diagonal(gram)
    return xp.where(diagonal > 0, xp.ones_like(diagonal), DEAD * xp.ones_like(diagonal))


def _cholesky(matrix: Array) -> Array | None:
    """Return the lower Cholesky factor, None where there is none."""
    try:
        factor = backend.namespace(matrix).linalg.cholesky(matrix)
    except (np.linalg.LinAlgError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "LinAlgError" not in type(error).__name__:
            raise  # such as no memory
        return None
    return factor if math.isfinite(backend.norm(factor)) else None


def sweep(
    W: Array,
    found: Feedback,
    bounds: Sequence[int],
    begin: Callable[[slice, Array], Settle],
) -> tuple[Array, float]:
    """Settle the weights of one input after the other.

    Parameters
    ----------
    W : array of shape (columns, rows)
        Weights, transposed so that those of an input are together. Overwritten.
    found : Feedback
        Of the inputs, in the order of `W` and in its dtype.
    bounds : sequence of int
        Panels of inputs that are looked at together before the first of them is settled: where
        each begins, and where the last one ends.
    begin : callable
        Called with the inputs of each panel and the weights by which they would make up for the
        errors before. Returns what settles its inputs.

    Returns
    -------
    W : array of shape (columns, rows)
        The weights as they were settled.
    objective : float
        Squared error of the outputs, damping included, over the mean diagonal.
    """
    xp = backend.namespace(W)
    errors = xp.asarray(W, copy=True)  # of what is settled, the weights as given elsewhere

    def make_up(first: int, middle: int, last: int) -> None:
        shares = xp.matrix_transpose(found.coefficients[first:middle, middle:last])
        W[middle:last, :] += xp.matmul(shares, errors[first:middle, :])

    def expected(first: int, last: int) -> Array:
        # What makes up for the errors so far if nothing from here on is changed any more: also
        # inputs of the panel make up for each other.
        shares = xp.matrix_transpose(found.coefficients[first:last, first:last])
        known = W[first:last, :] + xp.matmul(shares, errors[first:last, :])
        return xp.linalg.solve(backend.add_diagonal(shares, 1.0), known)

    def panels(first: int, last: int) -> None:
        start, stop = bounds[first], bounds[last]
        if last - first == 1:
            inputs(start, stop, start, begin(slice(start, stop), expected(start, stop)))
            return
        middle = (first + last) // 2
        panels(first, middle)
        make_up(start, bounds[middle], stop)
        panels(middle, last)

    def inputs(first: int, last: int, start: int, settle: Settle) -> None:
        if last - first == 1:
            W[first, :] = settle(first - start, W[first, :])
            errors[first, :] -= W[first, :]
            return
        middle = (first + last) // 2
        inputs(first, middle, start, settle)
        make_up(first, middle, last)
        inputs(middle, last, start, settle)

    panels(0, len(bounds) - 1)
    lost = errors + xp.matmul(xp.matrix_transpose(found.coefficients), errors)
    return W, float(xp.sum(found.weights[:, None] * lost**2))
