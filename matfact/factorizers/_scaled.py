"""Fits in which errors count by the size of a layer's inputs."""

from __future__ import annotations

from matfact import backend
from matfact.backend import Array
from matfact.factorizers._base import BaseFactorizer
from matfact.operators import FactorProduct
from matfact.solvers.finalize import scaled_columns


def fit_scaled(
    estimator: BaseFactorizer, W: Array, scale: Array
) -> tuple[BaseFactorizer, FactorProduct]:
    """Fit a factorizer to ``W · diag(scale)``, and take the scale out of the product again.

    Source: Boža & Macko 2025, Section 4.3.

    Parameters
    ----------
    estimator : BaseFactorizer
        Unfitted; it is fitted in place.
    W : array of shape (out_features, in_features)
        The matrix.
    scale : array of shape (in_features,)
        Positive: the root mean square of each input.

    Returns
    -------
    estimator : BaseFactorizer
        The fitted estimator.
    product : FactorProduct
        An approximation of `W`, its factors of equal norm.
    """
    scale = backend.namespace(W).astype(scale, W.dtype)
    scaled = W * scale[None, :]
    unit = backend.unit(scaled)
    scaled *= 1 / unit  # in place, so that the factorizer makes no copy
    estimator.fit(scaled)
    return estimator, scaled_columns(estimator.operator_, unit / scale).rescaled(1.0)
