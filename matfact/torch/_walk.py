"""A pass over all batches that stops at each layer, so that the layer can be replaced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from matfact.torch import _memory
from matfact.torch._batches import checked, device_of, eval_mode
from matfact.torch._cache import forget
from matfact.torch._collect import Collected, OwnPass
from matfact.torch._matrices import Matricized
from matfact.torch._offload import offloading
from matfact.torch._passes import Pass, gate
from matfact.torch._random import batch_states
from matfact.torch._statistics import LayerStatistics
from matfact.torch._survey import Survey, survey
from matfact.torch.capture import layer_views

Stops = Generator[tuple[str, LayerStatistics]]
_Views = dict[str, Matricized]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]


def walk(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    paired: bool = False,
    folder: Path | None = None,
) -> Stops:
    """Stop a pass over all batches at each layer, and go on with the layer that is there then.

    A first pass of the dense network finds out how often each batch calls each layer, and whether
    all that enters them is finite. Then every batch goes through the network once, as far as the
    last of `layers`, in a thread of its own that waits before each block with one of them. When all
    have come to a block, they run through it one after the other up to its first layer; the name of
    that and the statistics of its inputs, of all calls, are yielded, the caller may replace the
    layer, and the batches start again for the next one, which sees what the replacement makes of
    the inputs. In memory are the Gram matrices of one layer, what enters the block of all batches,
    and what one batch makes of it: many small batches take the least.

    A block is what a list of modules holds, such as a layer of a transformer; a layer that is in
    none is one by itself. Layers that are called more than once have their turn when all those that
    are called before them have had theirs, in runs of the whole network. All passes of a batch draw
    the same random numbers.

    Parameters
    ----------
    model : torch.nn.Module
        The network, which is in eval mode until the walk ends.
    layers : sequence of str
        Names of linear or convolutional layers. Where a network calls blocks in another order,
        that of `layers` decides between batches that wait before different ones.
    batches : iterable
        As for :func:`input_statistics`.
    paired : bool, default=False
        Whether each batch also runs through the layers as they were, in a second pass beside the
        first, so that inputs are known together with those in the dense network.
    folder : Path, optional
        Where batches keep what enters blocks while they wait, in files instead of memory.

    Yields
    ------
    name : str
        Name of a layer that was called; each comes once.
    statistics : LayerStatistics
        Those of its inputs.
    """
    views = layer_views(model, layers)
    drawn = list(zip(checked(batches), batch_states(device_of(model)), strict=False))
    with eval_mode(model):
        seen = survey(model, views, drawn)
        blocks = _blocks(model, views, seen)
        whole = [
            Arrived(i, calls, *(WholePass(model, *drawn[i]) if k <= paired else None for k in (0, 1)))
            for i, calls in enumerate(seen.calls)
        ]
        repeated = {name: views[name] for name in seen.repeated}
        with Walk(model, drawn, seen, blocks, paired, folder) as walk: ...
def _blocks(model: nn.Module, views: Mapping[str, Matricized], seen: Survey) -> dict[str, _Views]:
    """Return the layers of each block that batches come to, by the name of the block."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {name for name in modules if name and isinstance(modules[_parent(name)], lists)}
    innermost = {name: next((p for p in _around(name) if p in held), name) for name in views}
    chosen = set(innermost.values())
    blocks: dict[str, _Views] = {}
    for name, block in innermost.items():
        if name not in seen.around:  # no batch comes to it
            continue
        *_, outermost = (p for p in _around(block) if p in chosen)
        around = seen.around[name]
        blocks.setdefault(outermost if outermost in around else around[-1], {})[name] = views[name]
    return blocks


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> Iterator[str]:
    """Yield the names of a module and of those around it, from the inside out."""
    while name:
        yield name
        name = _parent(name)


def _stops(
    model: nn.Module,
    block: str,
    views: _Views,
    arrived: Mapping[OwnPass, Pass | None],
    as_dense: _Mode,
) -> Stops:
    """Yield the layers of a block in the order in which the batches that wait there call them."""
    while views and arrived:
        found = Collected(model, views, arrived, as_dense).statistics
        if not found:  # no batch calls any of them
            break
        forget(model.get_submodule(block))
        for name in list(found):
            del views[name]
            yield name, found.pop(name)
            _memory.trim()  # of what the caller has made of them


def _present(model: nn.Module, views: _Views) -> dict[str, nn.Module]:
    """Return the layers that the network has now, by each of their names."""
    layers = {view.layer for view in views.values()}
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if m in layers}


@contextlib.contextmanager
def _holding(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `layers` into the network, and what was there back after."""
    present = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in present.items():
            model.set_submodule(name, layer)
