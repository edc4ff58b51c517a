"""Repeated runs of a network on one batch with the same random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from matfact.torch.calibration.statistics import layer_input
from matfact.torch.layers._matricized import matricized
from matfact.torch.running._batches import as_written, device_of, forward
from matfact.torch.running._random import RandomState, drawing, generators_of
from matfact.torch.running._tensors import samplewise, tensors_in


@dataclasses.dataclass
class Trace:
    """Where outputs of a layer arrive, as positions along the channel axis.

    Attributes
    ----------
    read : dict of str to set of int
        Positions in the inputs of layers with a matrix view.
    passed : dict of str to set of int
        Positions in the inputs of modules with parameters per channel.
    closed : bool
        Whether they reach the outputs of the network in no other way.
    """

    read: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    passed: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    closed: bool = False


class Trial:
    """A network in eval mode with a batch to run on.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : tensor, mapping, tuple or list
        Input of the network.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self._state = RandomState.now(device_of(model), generators_of(model))

    def run(self) -> list[Tensor]:
        """Run the network and return all tensors in its outputs."""
        with drawing(self._state), as_written():
            return list(tensors_in(forward(self.model, self.batch)))

    def call_order(self) -> list[str]:
        """Return the names of the called layers, in the order of first calls."""
        calls: dict[str, None] = {}
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: calls.setdefault(name))
            for name, module in self.model.named_modules()
            if matricized(module) is not None
        ]
        with removed(handles):
            outputs = self.run()
        if any(bool(torch.isnan(output).any()) for output in outputs):
            raise ValueError("batch must give outputs without NaN, which is used to trace units.")
        return list(calls)

    def follow(self, producers: Sequence[str], units: Tensor) -> Trace:
        """Trace outputs of layers, set to NaN, to the layers that read them (as zeros)."""
        trace = Trace()

        def mark(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            axis, places = channel_axis(layer), units.to(output.device)
            return samplewise(lambda y: y.index_fill(axis, places, torch.nan), output)

        def read(layer: nn.Module, args: Any, kwargs: Any, *, name: str) -> Any:
            x = layer_input(args, kwargs)
            places = _nan_places(x, channel_axis(layer))
            if not places:
                return None
            trace.read.setdefault(name, set()).update(places)
            without = samplewise(lambda y: torch.where(torch.isnan(y), 0.0, y), x)
            return (without, *args[1:]), {}

        def passing(module: nn.Module, args: Any, kwargs: Any, *, name: str) -> None:
            if places := _nan_places(layer_input(args, kwargs), 1):
                trace.passed.setdefault(name, set()).update(places)

        handles = [self.model.get_submodule(p).register_forward_hook(mark) for p in producers]
        for name, module in self.model.named_modules():
            hook = passing if is_between(module) else read
            if hook is passing or matricized(module) is not None:
                handles.append(
                    module.register_forward_pre_hook(_named(hook, name), with_kwargs=True)
                )
        with removed(handles), contextlib.suppress(Exception):  # code may depend on values
            trace.closed = not any(bool(torch.isnan(output).any()) for output in self.run())
        return trace


def channel_axis(layer: Any) -> int:
    """Return the channel axis of the inputs and outputs of `layer`, counted from the end."""
    return -1 - len(getattr(layer, "kernel_size", ()))


def is_between(module: nn.Module) -> bool:
    """Whether a module holds parameters or statistics per channel."""
    return isinstance(module, (_NormBase, nn.PReLU)) or is_depthwise(module)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution."""
    groups = getattr(module, "groups", 1)
    plain = "weight" in module._parameters and matricized(module) is not None
    return plain and groups > 1 and groups == module.in_channels


def _named(hook: Any, name: str) -> Any:
    return lambda *args: hook(*args, name=name)


def _nan_places(x: Any, axis: int) -> set[int]:
    """Return the positions along `axis` where `x` has NaN."""
    found: set[int] = set()
    for y in tensors_in(x):
        if y.is_floating_point():
            marked = torch.isnan(y).movedim(axis, 0).flatten(1).any(dim=1)
            found.update(torch.nonzero(marked).flatten().tolist())
    return found


@contextlib.contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
