"""What a network's layers may get under a budget, and how much each of them matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import joblib
import torch
from torch import Tensor, nn

from matfact import metrics
from matfact.allocation import Option
from matfact.allocation._curves import DENSE
from matfact.operators import DenseFactor, FactorProduct
from matfact.torch._batches import checked, eval_mode, forward
from matfact.torch._fit import fit_layer
from matfact.torch._matrices import LayerStatistics
from matfact.torch._plan import Layers, Task, plan
from matfact.torch.capture import input_statistics, layer_views

_METHODS = ("dsf", "lowrank", "monarch", "magnitude")
_DENSITIES = (0.1, 0.2, 0.35, 0.5)


def layer_options(
    model: nn.Module,
    methods: Sequence[str] = _METHODS,
    densities: Sequence[float] = _DENSITIES,
    *,
    layers: Layers | None = None,
    calibration: Iterable[Any] | None = None,
    latency: Callable[[FactorProduct], float] | None = None,
    n_jobs: int = 1,
) -> dict[str, list[Option]]:
    """Fit layers by several methods at several densities, and list what each costs and loses.

    Parameters
    ----------
    model : torch.nn.Module
        The network, which is left as it is.
    methods : sequence of str
        What every layer may get, besides being left as it is: names in ``matfact.compare.METHODS``.
    densities : sequence of float
        Stored values ÷ entries, each in (0, 1]. More can be had by
        :func:`matfact.allocation.interpolate`.
    layers : str, collection of str or callable, optional
        As for :func:`compress`.
    calibration : iterable, optional
        Batches of inputs. With them errors are those of layer outputs.
    latency : callable, optional
        Returns the seconds that an operator takes; :func:`matfact.allocation.apply_seconds`.
    n_jobs : int, default=1
        Fits at a time.

    Returns
    -------
    dict of str to list of Option
        For each layer. FLOPs are for one input row, or one patch of a convolution.

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
    for density in densities:
        metrics.check_density(density)
    tasks = {m: plan(model, m, None, layers, {}, (False, False)) for m in methods}
    if not tasks:
        raise ValueError("methods must hold at least one method, got none.")
    every = next(iter(tasks.values()))
    found = {task.names[0]: [_dense(task, latency)] for task in every}
    seen = {} if calibration is None else input_statistics(model, calibration, list(found))
    work = [
        joblib.delayed(_options)(task, method, densities, seen.get(task.names[0]), latency)
        for method in tasks
        for task in tasks[method]
        if task.factorizer is not None
    ]
    for name, options in joblib.Parallel(n_jobs=n_jobs)(work):
        found[name] += options
    return found


def _dense(task: Task, latency: Callable[[FactorProduct], float] | None) -> Option:
    matrices = task.view.matrices()
    size = sum(matrix.numel() for matrix in matrices)
    products = [FactorProduct([DenseFactor(matrix)]) for matrix in task.view.arrays()]
    nbytes = size * matrices[0].element_size()
    return Option(DENSE, 1.0, 0.0, nbytes, 2 * size, _seconds(products, latency))


def _options(
    task: Task,
    method: str,
    densities: Sequence[float],
    statistics: LayerStatistics | None,
    latency: Callable[[FactorProduct], float] | None,
) -> tuple[str, list[Option]]:
    """Return the options of one layer by one method."""
    options = []
    factorizer: Any = task.factorizer
    itemsize = task.view.matrices()[0].element_size()
    for density in densities:
        factorizer.set_params(density=density)
        try:
            fitted = fit_layer(factorizer, task.view.arrays(), statistics)
        except ValueError as error:
            if "density" not in str(error):  # too small for the structure
                raise
            continue
        loss = fitted.relative_error if fitted.layer_error is None else fitted.layer_error
        flops = sum(product.flops for product in fitted.products)
        seconds = _seconds(fitted.products, latency)
        options.append(Option(method, density, loss, fitted.nbytes(itemsize), flops, seconds))
    return task.names[0], options


def _seconds(
    products: Sequence[FactorProduct], latency: Callable[[FactorProduct], float] | None
) -> float:
    return math.nan if latency is None else sum(map(latency, products))


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    layers: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return how much the loss changes where a layer's outputs are disturbed.

    The mean square of the first-order change of the loss, for disturbances of random directions,
    ÷ their squared relative size: the weight of a layer's squared error in
    :func:`matfact.allocation.allocate`.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode.
    batches : iterable
        What it is called with, as for :func:`input_statistics`.
    loss : callable
        Returns the loss to be differentiated from an output and its batch.
    layers : sequence of str, optional
        Names of linear or convolutional layers; all of them by default.

    Returns
    -------
    dict of str to float
        The mean over batches, 0 for layers that were not reached.
    """
    views = layer_views(model, layers)
    totals = dict.fromkeys(views, 0.0)
    count = 0

    def hook(name: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
            axis = 1 if hasattr(layer, "kernel_size") else -1
            power = output.detach().double().square().sum(axis) / output.shape[axis]

            def add(gradient: Tensor) -> None:
                totals[name] += float((power * gradient.double().square().sum(axis)).sum())

            if output.requires_grad:
                output.register_hook(add)

        return watch

    handles = [view.layer.register_forward_hook(hook(name)) for name, view in views.items()]
    try:
        with eval_mode(model), torch.enable_grad():
            for batch in checked(batches):
                count += 1
                inputs = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(loss(forward(model, batch), batch), inputs, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in totals.items()}
