"""Comparison of methods on the same matrices with the same number of stored values."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import joblib
import numpy as np
from sklearn.base import clone

from matfact import backend, metrics
from matfact._parallel import results
from matfact._progress import Bar, Step
from matfact._threads import single_threaded
from matfact.backend import Array
from matfact.compare._environment import environment
from matfact.compare._stored import StoredMatrix
from matfact.compare._table import Comparison, ComparisonRow
from matfact.factorizers import BaseFactorizer, Quantized
from matfact.factorizers._at_bits import check_bits, fit_at_bits
from matfact.factorizers._quantizer import BaseQuantizer
from matfact.factorizers._registry import MethodLike, make_estimators

_log = logging.getLogger(__name__)

#: A matrix, or a stored matrix.
Matrix = Array | StoredMatrix
#: Called after each fit with its row and the number of fits in the study, may raise to stop; or
#: whether to show a bar.
Progress = bool | Callable[[ComparisonRow, int], None] | None

#: Methods and dtypes compiled in this process.
_compiled: set[tuple[type, str]] = set()


def compare_projections(
    matrices: Mapping[str, Matrix] | Sequence[Matrix],
    methods: Sequence[MethodLike] | None = None,
    *,
    densities: Sequence[float] = (metrics.DEFAULT_DENSITY,),
    bits: Sequence[float] | None = None,
    n_jobs: int | None = None,
    random_state: int = 0,
    progress: Progress = False,
) -> Comparison:
    """Approximate every matrix by every method at every density, and measure the errors.

    Source: Section 5.3 and Fig. 3 of Boža & Macko (2025). Each fit runs on one thread, so the
    results, except times, do not depend on `n_jobs` or on the number of cores.

    Parameters
    ----------
    matrices : mapping of str to array or StoredMatrix, or sequence of such
        Matrices of shape (out_features, in_features), by name; in a sequence, by position. Layers
        not used by `cut_matrices` are recorded in the metadata.
    methods : sequence of str or (str, estimator), optional
        Names in ``matfact.compare.METHODS``, or pairs of any name and an unfitted estimator, which
        is cloned and set to each density if it has this parameter. None means all registered
        methods.
    densities : sequence of float, default=(0.25,)
        Stored values ÷ entries of the matrix, each in (0, 1].
    bits : sequence of float, optional
        Bits a weight as files hold them, each positive. With them every method gets the same
        bytes instead of the same number of values: it chooses its density and how many bits a
        value takes, and `densities` are not used.
    n_jobs : int, optional
        Number of parallel fits; -1 for all cores. None means 1, or the setting of an enclosing
        ``joblib.parallel_config``, which may also select Dask or Ray.
    random_state : int, default=0
        Seed of every estimator with ``random_state=None``.
    progress : bool or callable, default=False
        Whether to show a bar with the matrix, the time left and the error so far, in a terminal (on
        standard error) or a notebook; or a function, called as ``progress(row, total)`` whenever a
        fit ends.

    Returns
    -------
    Comparison
        One row per fit, in the order of `matrices`, `methods` and `densities`. A failed fit has
        status ``"failed"`` and the reason.

    Raises
    ------
    ValueError
        If an argument is invalid.

    References
    ----------
    - V. Boža, V. Macko, "Two Sparse Matrices are Better than One: Sparsifying Neural
      Networks with Double Sparse Factorization", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import compare_projections
    >>> W = np.random.RandomState(0).standard_normal((16, 16))
    >>> table = compare_projections({"W": W}, ["magnitude"], densities=[0.25, 0.5])
    >>> [(row.method, row.nnz, round(row.normalized_error, 6)) for row in table]
    [('magnitude', 64, 1.0), ('magnitude', 128, 1.0)]
    """
    estimators = checked_methods(methods, densities, bits)
    bar = Bar(progress)
    named = _name_matrices(matrices)
    tasks = _tasks(named, estimators, densities, bits, random_state)
    metadata = _describe(named, estimators, random_state)
    metadata |= (
        {"densities": [float(d) for d in densities]}
        if bits is None
        else {"bits": [float(b) for b in bits]}
    )
    if left_out := getattr(matrices, "left_out", None):
        metadata["left_out"] = dict(left_out)
    # Largest matrices first, to balance the load of workers.
    order = sorted(range(len(tasks)), key=lambda i: -math.prod(tasks[i].W.shape))
    rows: dict[int, ComparisonRow] = {}
    calls = [joblib.delayed(_run)(i, tasks[i]) for i in order]
    # One thread here too: workers may be threads of this process.
    with bar, single_threaded(), results(n_jobs, calls) as arriving:
        bar.expect([task.work for task in tasks], len(tasks))
        for i, row in arriving:
            rows[i] = row
            _log.info(
                "%s of %s: %s, %d fits in all", row.method, row.matrix, row.status, len(tasks)
            )
            kind, work = tasks[i].work
            name, entries = f"{row.method} {row.matrix}", row.rows * row.columns
            step = Step(name, kind, work, row.seconds or 0.0, row.relative_error, entries)
            bar.advance(step, row, len(tasks))
    return Comparison([rows[i] for i in range(len(tasks))], metadata)


def checked_methods(
    methods: Sequence[MethodLike] | None,
    densities: Sequence[float],
    bits: Sequence[float] | None,
) -> dict[str, BaseFactorizer]:
    """Return the estimators of a study by name, or raise ``ValueError`` for what cannot be run."""
    for name, given in (("densities", densities), ("bits", bits)):
        if given is not None and (not np.ndim(given) or not len(given)):
            raise ValueError(f"{name} must be a sequence of at least one, got {given!r}.")
    for density in densities:
        metrics.check_density(density)
    for goal in () if bits is None else bits:
        check_bits(goal)
    return make_estimators(methods, by_bits=bits is not None)


def _describe(
    matrices: Mapping[str, Matrix],
    estimators: Mapping[str, BaseFactorizer],
    random_state: int,
) -> dict[str, Any]:
    """Return the metadata of a study: its arguments and environment."""
    return {
        "methods": {name: repr(est) for name, est in estimators.items()},
        "random_state": random_state,
        "dtype": sorted({str(W.dtype).rpartition(".")[2] for W in matrices.values()}),
        "threads_per_fit": 1,
        **environment(),
    }


@dataclasses.dataclass(frozen=True)
class _Task:
    """A fit to run, possibly in another process."""

    name: str
    W: Matrix
    method: str
    estimator: BaseFactorizer
    density: float | None
    bits: float | None = None

    @property
    def work(self) -> tuple[str, float]:
        """The method and a number in proportion to the FLOPs of a fit."""
        rows, columns = self.W.shape
        return self.method, self.estimator.fit_work(rows, columns)


def _name_matrices(matrices: Mapping[str, Matrix] | Sequence[Matrix]) -> dict[str, Matrix]:
    items = matrices.items() if isinstance(matrices, Mapping) else enumerate(matrices)
    named = {
        str(name): W if isinstance(W, StoredMatrix) or backend.is_array(W) else np.asarray(W)
        for name, W in items
    }
    if not named:
        raise ValueError("matrices must hold at least one matrix, got none.")
    for name, W in named.items():
        if W.ndim != 2:
            raise ValueError(
                f"matrices must hold 2-D arrays, got one of shape {tuple(W.shape)} named {name!r}."
            )
    return named


def _tasks(
    matrices: Mapping[str, Matrix],
    estimators: Mapping[str, BaseFactorizer],
    densities: Sequence[float],
    bits: Sequence[float] | None,
    random_state: int,
) -> list[_Task]:
    tasks = []
    for name, W in matrices.items():
        for method, estimator in estimators.items():
            params = estimator.get_params(deep=False)
            seed = {"random_state": random_state} if params.get("random_state", 0) is None else {}
            for each in bits or ():
                seeded = clone(estimator).set_params(**seed)
                tasks.append(_Task(name, W, method, seeded, None, float(each)))
            asked: Sequence[float | None] = densities if "density" in params else (None,)
            for goal in asked if bits is None else ():
                given = seed if goal is None else seed | {"density": goal}
                tasks.append(_Task(name, W, method, clone(estimator).set_params(**given), goal))
    return tasks


def _run(index: int, task: _Task) -> tuple[int, ComparisonRow]:
    """Fit, and return the row with its position in the table."""
    rows, columns = (int(n) for n in task.W.shape)
    row = ComparisonRow(
        matrix=task.name,
        rows=rows,
        columns=columns,
        size=str(rows) if rows == columns else f"{rows}×{columns}",
        method=task.method,
        requested_density=task.density,
        requested_bits=task.bits,
        status="ok",
    )
    with single_threaded(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            measures = _measure(task)
        except Exception as error:  # a failed fit must not end the study
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            return index, dataclasses.replace(row, status="failed", message=reason)
    message = " ".join(dict.fromkeys(str(warning.message) for warning in caught))
    return index, dataclasses.replace(row, message=message, **measures)


def _measure(task: _Task) -> dict[str, Any]:
    if isinstance(task.W, StoredMatrix):
        task = dataclasses.replace(task, W=task.W.read())
    _compile(task)
    start = time.perf_counter()
    if task.bits is None:
        fitted = task.estimator.fit(task.W)
    else:
        fitted = fit_at_bits(task.estimator, task.W, task.bits)
    seconds = time.perf_counter() - start
    return {
        "density": fitted.density_,
        "nnz": fitted.nnz_,
        "relative_error": fitted.reconstruction_err_,
        "normalized_error": fitted.normalized_err_,
        "seconds": seconds,
        "n_iter": fitted.n_iter_,
        "flops_ratio": fitted.operator_.flops_ratio,
        "nbytes": fitted.operator_.nbytes(),
        "value_bits": fitted.bits if isinstance(fitted, (Quantized, BaseQuantizer)) else None,
        "bits_per_weight": fitted.bits_per_weight_,
    }


def _compile(task: _Task) -> None:
    """Fit a corner of the matrix once per process and method, to compile outside of timings."""
    key = (type(task.estimator), str(task.W.dtype))
    if key in _compiled:
        return
    _compiled.add(key)
    estimator = clone(task.estimator)
    if task.density is not None:
        estimator.set_params(density=None)  # the corner may be too small for the density
    with contextlib.suppress(Exception):  # errors will show in the actual fit
        estimator.fit(cast(Array, task.W)[:32, :32])
