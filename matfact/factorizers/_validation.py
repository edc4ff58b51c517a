"""Validation of the input of estimators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from sklearn.utils.validation import check_array

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.metrics import UnsuitableMatrix
from matfact.operators._arithmetic import shared_namespace

#: Maximum number of sparse factors; each takes as much memory as a square matrix.
MOST_FACTORS = 64
#: Smallest allowed maximum of calibration inputs, whose squares must not underflow.
SMALLEST = 1e-140
#: Limits on the entries of a padded structure: absolute, and relative to the matrix.
ROOM, PADDING = 1 << 24, 16


def check_matrix(W: Any, name: str, *, allow_complex: bool = False) -> Array:
    """Return `W` as a finite, non-empty 2-D array of a floating dtype, from the same library.

    Foreign byte order is converted to native, and long doubles are rounded to float64.

    Parameters
    ----------
    W : array-like of shape (rows, columns)
        Array of any Array API library; lists, DataFrames and the like become NumPy arrays.
    name : str
        Name in error messages.
    allow_complex : bool, default=False
        Whether complex entries are accepted.

    Raises
    ------
    TypeError
        If `W` is a SciPy sparse matrix or array, or a ``numpy.matrix``.
    ValueError
        If `W` is not 2-D, is empty, or holds NaN, infinite or (unless allowed) complex values.
    """
    if not backend.is_array(W) or backend.is_numpy(W):
        W = _plain_array(W, name)
    W = backend.detached(W)
    xp = backend.namespace(W)
    shape = tuple(int(n) for n in W.shape)
    if len(shape) != 2:
        raise ValueError(
            f"{name} must be a 2-D array, got {len(shape)}-D with shape {shape}. Reshape your "
            "data to (rows, columns), for instance with reshape(-1, 1) or reshape(1, -1)."
        )
    for n, axis in zip(shape, ("sample(s)", "feature(s)"), strict=True):
        if n == 0:
            raise ValueError(
                f"{name} must not be empty: 0 {axis} (shape={shape}) while a minimum of 1 is "
                "required."
            )
    if xp.isdtype(W.dtype, "complex floating") and not allow_complex:
        raise UnsuitableMatrix(f"{name} must be real. Complex data not supported: got {W.dtype}.")
    dtype = backend.storage_dtype(W)
    if W.dtype != dtype:
        W = xp.astype(W, dtype)
    if not bool(xp.all(xp.isfinite(W))):
        what = "NaN" if bool(xp.any(xp.isnan(W))) else "infinity"
        raise UnsuitableMatrix(f"{name} must be finite. Input {name} contains {what}.")
    return W


def _plain_array(W: Any, name: str) -> np.ndarray:
    """Convert an array-like to a NumPy array of numbers."""
    if np.ma.is_masked(W):
        raise ValueError(f"{name} must have a value everywhere, got an array with masked entries.")
    if type(W) is not np.ndarray or W.dtype.kind in "OUS":
        W = check_array(
            W, input_name=name, dtype=None, ensure_2d=False, allow_nd=True, ensure_min_samples=0,
            ensure_all_finite=False,
        )  # fmt: skip
    if W.dtype.kind in "OUS":
        try:
            W = W.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} must hold real numbers, but {error}.") from error
    if W.dtype.kind not in "biufc":
        raise ValueError(f"{name} must hold numbers, got an array of dtype {W.dtype}.")
    return W


def check_calibration(calibration: Any, W: Array) -> InputStatistics:
    """Return the statistics of the layer inputs `calibration`, checked against `W`.

    Parameters
    ----------
    calibration : array-like of shape (n_samples, in_features) or InputStatistics
        The inputs or their statistics.
    W : array of shape (out_features, in_features)
        Weights of the layer.

    Raises
    ------
    ValueError
        If there are no inputs, or their width, library or device differs from that of `W`.
    """
    if isinstance(calibration, InputStatistics):
        statistics = calibration
    else:
        inputs = check_matrix(calibration, "calibration")
        if 0.0 < (largest := backend.max_abs(inputs)) < SMALLEST:
            raise ValueError(
                f"calibration must hold inputs of at least {SMALLEST:g}, whose squares do not "
                f"underflow, got {largest:g} as the largest."
            )
        statistics = InputStatistics().update(inputs)
    if statistics.n_features != W.shape[1]:
        raise ValueError(
            f"calibration must hold inputs with in_features={W.shape[1]} columns, got "
            f"{statistics.n_features}."
        )
    shared_namespace(statistics.gram, "calibration", W, "W")
    return statistics


def room(shape: tuple[int, ...]) -> int:
    """Return the maximum number of entries of a structure that pads a matrix of `shape`."""
    return max(ROOM, PADDING * math.prod(shape))
