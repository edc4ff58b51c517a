"""How much faster a compressed network is than its dense form."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matfact._checks import check_positive_int
from matfact.operators import FactorProduct
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._batches import device_of, eval_mode, forward
from matfact.torch.running._offloaded import refuse_offloaded

_LAYERS = (FactorizedLinear, FactorizedConv)


class Speed(NamedTuple):
    """Time of a compressed network, and of the same network with dense layers.

    Attributes
    ----------
    seconds, dense_seconds : float
        Median time of a pass.
    speedup : float
        Median over turns of the dense time ÷ the compressed one.
    layers : float
        Share of the dense time that the compressed layers take.
    """

    seconds: float
    dense_seconds: float
    speedup: float
    layers: float

    @property
    def bound(self) -> float:
        """Speed-up if compressed layers took no time; infinite if nothing else takes any."""
        return 1 / (1 - self.layers) if self.layers < 1 else float("inf")


def measure_speed(
    model: nn.Module, batch: Any | Callable[[nn.Module], object], *, turns: int = 7
) -> Speed:
    """Measure how much faster a compressed network is than with dense layers in their place.

    Both take turns in this process, in eval mode, so that other programs slow down both. For the
    time, the dense layers take as much memory as before compression.

    Parameters
    ----------
    model : torch.nn.Module
        The compressed network, which is not changed.
    batch : tensor, mapping, tuple, list or callable
        Input of a pass, as in calibration, or a function of the network that runs it otherwise,
        such as ``lambda network: network.generate(tokens)``.
    turns : int, default=7
        Timed passes of each form, after one that is not timed.

    Returns
    -------
    Speed
        Times, their ratio, and what it could be at most.

    Raises
    ------
    TypeError
        If `batch` is a network.
    ValueError
        If no layer is factorized, if layers are offloaded, or if `turns` is below 1.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import compress, measure_speed
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> small, _ = compress(model, "dsf", density=0.25)
    >>> speed = measure_speed(small, torch.randn(8, 64))
    >>> 0 < speed.layers <= 1 <= speed.bound
    True
    """
    check_positive_int("turns", turns)
    if isinstance(batch, nn.Module):
        raise TypeError(
            f"batch must be an input or a function of model, got {type(batch).__name__}."
        )
    refuse_offloaded(model)
    if not any(isinstance(module, _LAYERS) for module in model.modules()):
        raise ValueError("model must have factorized layers, got none.")
    dense, layers = _dense_twin(model)
    run = batch if callable(batch) else lambda network: forward(network, batch)
    device = device_of(model)
    with eval_mode(model), eval_mode(dense), torch.inference_mode():
        times = [
            [_seconds(run, network, device) for network in (model, dense)]
            for _ in range(turns + 1)  # the first prepares kernels and caches
        ][1:]
        share = statistics.median(_share(run, dense, layers, device) for _ in range(turns))
    ours, theirs = zip(*times, strict=True)
    ratio = statistics.median(long / short for short, long in times)
    return Speed(statistics.median(ours), statistics.median(theirs), ratio, share)


def measure_products(products: Sequence[FactorProduct], batch_size: int, turns: int = 7) -> Speed:
    """Measure the products of a network one after the other, each on samples of its own.

    All are in memory, factors and dense matrices, so that each comes from there as in a network: a
    single product that is applied again and again is found in the processor's cache.
    """
    layers = [FactorizedLinear(product, copy=False) for product in products]
    samples = [
        torch.ones(batch_size, each.in_features, dtype=each.chain[0].values.dtype)
        for each in layers
    ]
    return measure_speed(_Layers(layers), lambda network: network(samples), turns=turns)


class _Layers(nn.ModuleList):
    def forward(self, samples: Sequence[Tensor]) -> None:
        for layer, each in zip(self, samples, strict=True):
            layer(each)


def _dense_twin(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """Return a copy with dense layers, and these; whatever else is stored is shared."""
    held = [module for module in model.modules() if isinstance(module, _LAYERS)]
    inside = {
        kernel for layer in held if isinstance(layer, FactorizedConv) for kernel in layer.kernels
    }
    made = {
        id(layer): layer.to_dense().requires_grad_(False) for layer in held if layer not in inside
    }
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo | made), list(made.values())


def _seconds(run: Callable[[nn.Module], object], network: nn.Module, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run(network)
    _wait(device)
    return time.perf_counter() - start


def _share(
    run: Callable[[nn.Module], object], dense: nn.Module, layers: list[nn.Module],
    device: torch.device,
) -> float:  # fmt: skip
    """Return the share of the time of a pass that `layers` take."""
    spent, started = [0.0], [0.0]

    def before(*_: Any) -> None:
        _wait(device)
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        _wait(device)
        spent[0] += time.perf_counter() - started[0]

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        total = _seconds(run, dense, device)
    finally:
        for hook in hooks:
            hook.remove()
    return min(1.0, spent[0] / total)


def _wait(device: torch.device) -> None:
    """Wait until an asynchronous device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
