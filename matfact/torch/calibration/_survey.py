"""Survey of the calls of a network's layers, from one pass per batch before any work starts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_input, rows_of
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import forward
from matfact.torch.running._random import RandomState, drawing
from matfact.torch.running._traces import Traces

#: A module on the call stack, and the number of the call.
_Call = tuple[str, int]
#: Fingerprint of a tensor: shape, norm, and inner product with fixed numbers.
Mark = tuple[Any, float, float]

#: Tolerance of fingerprints, relative to the norm, for inputs that differ by rounding.
_ROUNDING = 0.02


def mark(x: Tensor) -> Mark:
    """Return the fingerprint of a tensor."""
    if x.is_nested:
        return mark(torch.cat([each.flatten() for each in x.unbind()]))
    numbers = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    values = numbers.flatten().float()
    fixed = torch.arange(values.numel(), device=x.device, dtype=torch.float32).cos_()
    return tuple(x.shape), float((values * values).sum().sqrt()), float((values * fixed).sum())


def are_alike(a: Mark, b: Mark) -> bool:
    """Whether two fingerprints agree up to rounding."""
    (shape, *sums), (other, *others) = a, b
    off = max(abs(x - y) for x, y in zip(sums, others, strict=True))
    return bool(shape == other) and off <= _ROUNDING * max(a[1], b[1])


@dataclasses.dataclass(frozen=True)
class Survey:
    """Calls of a network's layers.

    Attributes
    ----------
    calls : list of Counter
        Number of calls of each layer, per batch.
    around : dict of str to list of str
        For each called layer, in the order of first calls: the modules that contain all of its
        calls and are called once by every batch that calls the layer, from the outside in. Starts
        with ``""``, the network, and ends with the layer itself if it is called once.
    marks : list of dict
        Fingerprint of the input of the first call, for each batch and layer.
    interferes : bool
        Whether passes may read data left by others, such as tensors in buffers or attributes of
        modules, and thus cannot run interleaved.
    """

    calls: list[Counter[str]]
    around: dict[str, list[str]]
    marks: list[dict[str, Mark]]
    interferes: bool = False

    @property
    def repeated(self) -> list[str]:
        """The layers that batches do not reach one after the other, in the order of first calls.

        These are the first layer that a batch calls more than once, or in another order than other
        batches, and all layers after it. If passes interfere, these are all layers.
        """
        if self.interferes:
            return list(self.around)
        turns = {name: i for i, name in enumerate(self.around)}
        found = {turns[name] for calls in self.calls for name, n in calls.items() if n > 1}
        for calls in self.calls:  # in the order of calls
            order = [turns[name] for name in calls]
            found |= {turn for pair in zip(order, sorted(order), strict=True)
                      if pair[0] != pair[1] for turn in pair}  # fmt: skip
        return list(self.around)[min(found, default=len(turns)) :]


def survey(
    model: nn.Module,
    views: Mapping[str, Matricized],
    batches: Iterable[tuple[Any, RandomState]],
    traces: Traces,
) -> Survey:
    """Return the calls of layers in each batch, and the modules around all calls.

    Parameters
    ----------
    model : torch.nn.Module
        The network, in eval mode.
    views : mapping of str to Matricized
        The layers.
    batches : iterable of tuple
        Batches with their states of the random number generators.
    traces : Traces
        State that passes may leave in the network; restored after each.

    Raises
    ------
    ValueError
        If an input of a layer is not finite. The message names the layer and the batch.
    """
    found, leaves_tensors = Survey([], {}, []), False
    names = {view.layer: name for name, view in views.items()}
    watched = {
        module: names.get(module, name)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    }
    watch = _Watch(model, views)
    with contextlib.ExitStack() as handles, torch.no_grad():
        for module, name in watched.items():
            for handle in watch.hooks(module, name, is_layer=module in names):
                handles.callback(handle.remove)
        for batch, state in batches:
            watch.start(len(found.calls), batch)
            try:
                with drawing(state):
                    forward(model, batch)
            except Exception as error:
                error.add_note(f"This was calibration batch {watch.index}.")
                raise
            finally:
                leaves_tensors |= traces.restore()
            found.calls.append(Counter({name: watch.calls[name] for name in watch.common}))
            found.marks.append(watch.marks)
            for name, stack in watch.common.items():
                around = [each for each, _ in stack if watch.calls[each] == 1]
                before = found.around.get(name, around)
                found.around[name] = [each for each in before if each in around]
    return dataclasses.replace(found, interferes=leaves_tensors)


class _Watch:
    """Call stack of one batch, and the modules common to all calls of each layer."""

    def __init__(self, model: nn.Module, views: Mapping[str, Matricized]) -> None:
        self._model, self._views = model, views

    def start(self, index: int, batch: Any) -> None:
        self.index, self._batch = index, batch
        self.calls: Counter[str] = Counter()
        self.common: dict[str, list[_Call]] = {}
        self.marks: dict[str, Mark] = {}
        self._stack: list[_Call] = []

    def hooks(self, module: nn.Module, name: str, is_layer: bool) -> Iterable[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[name] += 1
            self._stack.append((name, self.calls[name]))
            if is_layer:
                before = self.common.get(name, self._stack)
                self.common[name] = [call for call in before if call in self._stack]
                x = layer_input(args, kwargs)
                self._check(name, x)
                self.marks.setdefault(name, mark(x))

        def leave(*_: Any) -> None:
            self._stack.pop()

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave, always_call=True)

    def _check(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"calibration must hold tensors, but layer {name!r} gets a "
                f"{type(x).__name__} in batch {self.index}."
            )
        if not bool(torch.isfinite(rows_of(self._views[name], x, self._batch, self._model)).all()):
            raise ValueError(
                f"calibration must lead to finite inputs, but those of layer {name!r} are not in "
                f"batch {self.index}."
            )
