"""Allocation of methods and densities to a network's layers under a budget."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import joblib
import numpy as np
from sklearn.base import clone
from torch import nn

from matfact import metrics
from matfact._progress import Bar, Step
from matfact.allocation import Allocation, Option, allocate, apply_seconds, interpolate
from matfact.allocation._budget import Cost, override
from matfact.allocation._curves import DENSE
from matfact.backend import Array
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._settings import (
    check_value_bits,
    configured,
    density_of,
    has_bits,
    has_density,
)
from matfact.operators import DenseFactor, FactorProduct
from matfact.torch.calibration._layer_statistics import LayerStatistics
from matfact.torch.calibration.statistics import captured, layer_views
from matfact.torch.compression._fit import fit_layer
from matfact.torch.compression._resume import Parts
from matfact.torch.compression._tasks import (
    Layers,
    Method,
    Override,
    Position,
    Task,
    near,
    plan,
)
from matfact.torch.layers._matricized import Dimensions, distinct_layers, is_linear

_METHODS = ("dsf", "lowrank", "monarch", "magnitude")
_DENSITIES = (0.1, 0.2, 0.35, 0.5)
#: Further densities, with interpolated costs and errors.
_BETWEEN = tuple(i / 40 for i in range(1, 40))
#: Density and bits of a trial; None for those of the factorizer.
_Trial = tuple[float | None, float | None]
#: Method name, layer, and its trials.
_Work = tuple[str, Task, Sequence[_Trial]]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Maximum total cost of the selected layers, for `compress`.

    Attributes
    ----------
    amount : float
        The maximum cost. Numbers up to 1 are a share of the cost of the dense layers.
    cost : {"nbytes", "flops", "seconds"}, default="nbytes"
        Kind of cost: bytes of values and positions in files; floating-point operations; or measured
        time of the operators for one sample, for which `amount` must be a share. With calibration
        inputs, FLOPs and seconds of a layer are multiplied by its number of calls, relative to the
        layer with the fewest calls.
    weights : mapping of str to float, optional
        Weight of each layer's squared relative error, by default 1; see `output_harm`
        and, with a loss, `output_sensitivity`.
    densities : sequence of float
        Stored values ÷ entries at which every method is tried in every layer. Costs and errors in
        between are interpolated.
    value_bits : sequence of int or None
        Bits of values, from 2 to 8, with which every method is tried at every density; None for
        floating-point values.
    bits : sequence of float
        Bits at which methods without a density are tried, such as "double_binary".
    """

    amount: float
    cost: Cost = "nbytes"
    weights: Mapping[str, float] | None = None
    densities: Sequence[float] = (*_DENSITIES, 0.75)
    value_bits: Sequence[int | None] = (None,)
    bits: Sequence[float] = (2, 3, 4, 6, 8)

    def __post_init__(self) -> None:
        number = isinstance(self.amount, (int, float)) and not isinstance(self.amount, bool)
        if not number or not 0 < self.amount < math.inf:
            raise ValueError(f"budget must be a positive number, got {self.amount!r}.")
        if self.cost not in get_args(Cost):
            raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got {self.cost!r}.")
        if self.cost == "seconds" and self.amount > 1:
            raise ValueError(f"budget must be a share, at most 1, of seconds, got {self.amount}.")
        for density in self.densities:
            metrics.check_density(density)
        if not self.value_bits:
            raise ValueError("value_bits must hold None or some bits, got none.")
        for value_bits in self.value_bits:
            check_value_bits(value_bits)

    def trials(self, factorizer: BaseFactorizer) -> list[_Trial]:
        """Return the densities and bits at which a factorizer is tried."""
        if has_density(factorizer):
            several = [None] if has_bits(factorizer) else self.value_bits
            return [(density, bits) for density in self.densities for bits in several]
        return [(None, bits) for bits in (self.bits if has_bits(factorizer) else self.value_bits)]


def named_methods(methods: Method | Sequence[Method]) -> dict[str, Method]:
    """Return methods by name; a factorizer has the name of its class."""
    several = [methods] if isinstance(methods, (str, BaseFactorizer)) else list(methods)
    named = {m if isinstance(m, str) else type(m).__name__: m for m in several}
    if not named:
        raise ValueError("methods must hold at least one method, got none.")
    if len(named) < len(several):
        raise ValueError("methods must have different names; a factorizer has that of its class.")
    return named


def within_budget(
    model: nn.Module,
    budget: Budget,
    methods: Mapping[str, Method],
    *,
    layers: Layers | None = None,
    overrides: Mapping[str, Override] | None = None,
    keep: Sequence[Position] = (),
    calibration: Iterable[Any] | None = None,
    n_jobs: int = 1,
    bar: Bar,
    parts: Parts,
) -> tuple[Allocation, dict[str, Override]]:
    """Return the method and density of each layer, also as overrides.

    Kept layers and layers with an override count with their cost.

    Raises
    ------
    ValueError
        If the budget is below the cost of the cheapest choice.
    """
    planned = {m: plan(model, methods[m], None, layers, overrides or {}, keep) for m in methods}
    every = next(iter(planned.values()))
    _check_weights(model, budget.weights or {})
    latency = apply_seconds if budget.cost == "seconds" else None
    found = {task.names[0]: _dense_once(task, latency, parts) for task in every}
    seen = _captured(model, calibration, _taken(every))
    calls = {name: statistics.count for name, statistics in seen.items() if statistics.count}
    least = min(calls.values(), default=1)
    share = {name: calls.get(name, least) / least for name in found}
    dense = math.fsum(getattr(_called(found[n][0], share[n]), budget.cost) for n in found)
    free = [task.names[0] for task in every if task.factorizer is not None and not task.is_given]
    work = _work(planned, budget)
    # Each layer is then fitted once more, by one of the methods.
    later = [(kind, amount / len(planned)) for kind, amount in _amounts(work, seen, each=True)]
    left = [each for each in work if _key(*each) not in parts.tried]
    bar.expect([*_amounts(left, seen), *later], len(work), "trials of methods")
    for name, options in _measured(work, seen, latency, n_jobs, bar, parts):
        found[name] = found[name] + options if name in free else options
    choices = {
        name: [_called(option, share[name]) for option in _more(options, name in free)]
        for name, options in found.items()
    }
    ceiling = budget.amount * dense if budget.amount <= 1 else budget.amount
    weights = {n: w for n, w in (budget.weights or {}).items() if n in choices}
    allocation = allocate(choices, ceiling, cost=budget.cost, weights=weights)
    chosen: dict[str, Override] = {}
    for name in free:
        best = override(allocation.options[name])
        chosen[name] = None if best is None else (methods[best[0]], *best[1:])
    return allocation, chosen


def _work(planned: Mapping[str, list[Task]], budget: Budget) -> list[_Work]:
    """Return all methods with their trials, but only the override where there is one.

    Layer by layer, so that the time of every method is soon known.
    """
    first, *_ = planned
    work: list[_Work] = []
    for same in zip(*planned.values(), strict=True):
        for label, task in zip(planned, same, strict=True):
            if task.factorizer is None:
                continue
            if not task.is_given:
                work.append((label, task, budget.trials(task.factorizer)))
            elif label == first:
                work.append((label, task, [(None, None)]))
    return work


def _more(options: list[Option], is_free: bool) -> list[Option]:
    """Add interpolated options for layers with a choice."""
    return interpolate(options, _BETWEEN) if is_free else options


def _called(option: Option, times: float) -> Option:
    """Return the option with the cost of `times` calls."""
    flops, seconds = round(option.flops * times), option.seconds * times
    return dataclasses.replace(option, flops=flops, seconds=seconds)


def layer_options(
    model: nn.Module,
    methods: Sequence[Method] = _METHODS,
    densities: Sequence[float] = _DENSITIES,
    *,
    layers: Layers | None = None,
    calibration: Iterable[Any] | None = None,
    latency: Callable[[FactorProduct], float] | None = None,
    n_jobs: int = 1,
    value_bits: Sequence[int | None] = (None,),
    bits: Sequence[float] = Budget.bits,
) -> dict[str, list[Option]]:
    """Fit layers by several methods at several densities, and list their costs and errors.

    Parameters
    ----------
    model : torch.nn.Module
        The network, which is not changed.
    methods : sequence of str or BaseFactorizer
        Methods to try in addition to keeping the layer: names as in `compress`, or
        factorizers, which have the name of their class.
    densities : sequence of float
        Stored values ÷ entries, each in (0, 1]. Use `matfact.allocation.interpolate` to add
        more.
    layers : str, collection of str or callable, optional
        As in `compress`.
    calibration : iterable, optional
        Batches of inputs. Errors are then those of layer outputs.
    latency : callable, optional
        Returns the seconds of an operator, such as `matfact.allocation.apply_seconds`.
    n_jobs : int, default=1
        Number of parallel fits.
    value_bits, bits : sequence
        As in `Budget`.

    Returns
    -------
    dict of str to list of Option
        Options of each layer. FLOPs are for one input row, or one patch of a convolution.

    Examples
    --------
    >>> import torch
    >>> from matfact.allocation import allocate
    >>> from matfact.torch import compress, layer_options
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    >>> options = layer_options(model, ["lowrank", "magnitude"], [0.25, 0.5])
    >>> allocation = allocate(options, budget=5000)
    >>> small, report = compress(model, overrides=allocation.overrides)
    >>> sum(row.nbytes for row in report) <= 5000
    True
    """
    budget = Budget(1.0, densities=densities, value_bits=value_bits, bits=bits)
    named = named_methods(methods)
    planned = {m: plan(model, named[m], None, layers, {}) for m in named}
    every = next(iter(planned.values()))
    found = {task.names[0]: [_dense(task, latency)] for task in every}
    seen = _captured(model, calibration, _taken(every))
    work: list[_Work] = [
        (label, task, budget.trials(task.factorizer))
        for label, tasks in planned.items()
        for task in tasks
        if task.factorizer is not None
    ]
    for name, options in _measured(work, seen, latency, n_jobs, Bar(False), Parts()):
        found[name] += options
    return found


def _captured(
    model: nn.Module, calibration: Iterable[Any] | None, layers: list[str]
) -> dict[str, LayerStatistics]:
    return {} if calibration is None else captured(model, calibration, layer_views(model, layers))


def _amounts(
    work: Sequence[_Work], seen: Mapping[str, LayerStatistics], *, each: bool = False
) -> list[tuple[str, float]]:
    """Return kind and amount of all trials of each task, or of one of them."""
    kinds = [(task.work(task.names[0] in seen), len(trials)) for _, task, trials in work]
    return [(kind, amount * (1 if each else n)) for (kind, amount), n in kinds]


def _measured(
    work: Sequence[_Work],
    seen: Mapping[str, LayerStatistics],
    latency: Callable[[FactorProduct], float] | None,
    n_jobs: int,
    bar: Bar,
    parts: Parts,
) -> Iterator[tuple[str, list[Option]]]:
    """Yield the options of each task by the named method, in the order of `work`."""
    amounts = dict(zip((_key(*each) for each in work), _amounts(work, seen), strict=True))
    found = {key: parts.trials(key) or [] for key in amounts if key in parts.tried}
    for key in found:
        bar.advance(Step(key, work=0.0))
    jobs = (
        joblib.delayed(_options)(task, label, trials, seen.get(task.names[0]), latency)
        for label, task, trials in work
        if _key(label, task) not in found
    )
    run = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    for key, options, seconds in run(jobs):
        parts.add_trials(key, options)
        bar.advance(Step(key, *amounts[key], seconds))
        found[key] = options
    for label, task, _ in work:
        yield task.names[0], found[_key(label, task)]


def _key(label: str, task: Task, *_: Any) -> str:
    """Return the name of the trials of a method on a layer."""
    return f"{label} {task.names[0]}"


def _taken(tasks: Iterable[Task]) -> list[str]:
    """Return the names of layers with a matrix view."""
    return [task.names[0] for task in tasks if task.view is not None]


def _check_weights(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Raise ``ValueError`` for a weight that matches no layer, selected or not."""
    known = [name for names, layer in distinct_layers(model) if is_linear(layer) for name in names]
    for name in weights:
        if name not in known:
            raise ValueError(
                f"weights of the budget must name layers, but {name!r} is not one"
                f"{near(name, known)}."
            )


def _dense(task: Task, latency: Callable[[FactorProduct], float] | None) -> Option:
    shape, size = task.dimensions, task.dimensions.size
    arrays = task.view.arrays() if task.view is not None else _alike(shape)
    products = [FactorProduct([DenseFactor(array)]) for array in arrays] if latency else []
    return Option(DENSE, 1.0, 0.0, size * shape.itemsize, 2 * size, _seconds(products, latency))


def _dense_once(
    task: Task, latency: Callable[[FactorProduct], float] | None, parts: Parts
) -> list[Option]:
    """Return the dense layer as an option, with the time that an earlier run has measured."""
    if latency is None:
        return [_dense(task, latency)]
    key = f"{DENSE} {task.names[0]}"
    if (known := parts.trials(key)) is None:
        known = [_dense(task, latency)]
        parts.add_trials(key, known)
    return known


def _alike(shape: Dimensions) -> list[Array]:
    """Return matrices to time for layers without a matrix view."""
    each = np.zeros((shape.rows, shape.columns), np.float32)
    return [each] * shape.groups if each.size else []


def _options(
    task: Task,
    method: str,
    trials: Sequence[_Trial],
    statistics: LayerStatistics | None,
    latency: Callable[[FactorProduct], float] | None,
) -> tuple[str, list[Option], float]:
    """Return the options of one layer for one method, with their key and the seconds it took."""
    start, options = time.perf_counter(), []
    factorizer, matrices, has_bias = task.problem()
    for density, bits in trials:
        tried = configured(clone(factorizer), density, bits)
        try:
            fitted = fit_layer(tried, matrices, statistics, shift=has_bias)
        except metrics.DensityTooSmall:
            continue
        measured = (fitted.layer_error, fitted.fitted_layer_error, fitted.relative_error)
        loss = next(error for error in measured if error is not None)
        flops = sum(product.flops for product in fitted.products)
        seconds = _seconds(fitted.products, latency)
        nbytes = fitted.nbytes(task.dimensions.itemsize)
        asked = density if density is not None else density_of(tried)
        asked = math.nan if asked is None else asked
        options.append(Option(method, asked, loss, nbytes, flops, seconds, bits))
    return _key(method, task), options, time.perf_counter() - start


def _seconds(
    products: Sequence[FactorProduct], latency: Callable[[FactorProduct], float] | None
) -> float:
    return math.nan if latency is None else sum(map(latency, products))
