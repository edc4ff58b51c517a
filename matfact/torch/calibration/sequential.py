"""A pass over all batches that stops at each layer, so that the layer can be replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration._collect import Arrived, Collected
from matfact.torch.calibration._layer_statistics import LayerStatistics
from matfact.torch.calibration._offload import between, offloading
from matfact.torch.calibration._passes import Pass, WholePass, waiting_before
from matfact.torch.calibration._survey import Survey, are_alike, mark, survey
from matfact.torch.calibration.statistics import layer_views
from matfact.torch.layers._derived import forget
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import checked, eval_mode
from matfact.torch.running._random import RandomState, batch_states
from matfact.torch.running._traces import Traces

_WHOLE = "calibrated in runs of the whole network, since batches cannot wait before its blocks"
#: Passes that may wait at a time, each in a thread of some 0.1 MB.
MOST_PASSES = 2048

Stops = Generator[tuple[str, LayerStatistics]]
_Views = dict[str, Matricized]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]


def sequential_statistics(
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

    Before that, all batches go through the dense network in the same way. If layers are then given
    anything else than in the first pass, as where blocks read what other batches or threads write,
    all layers have their turn one by one.

    A block is what a list of modules holds, such as a layer of a transformer; a layer that is in
    none is one by itself. From the first layer on that is called more than once, or in another
    order by another batch, layers have their turn one by one, in runs of the whole network; so do
    all layers of a network whose passes leave tensors in its modules. All passes of a batch draw
    the same random numbers, and nothing is left in the network.

    Parameters
    ----------
    model : torch.nn.Module
        The network, which is in eval mode until the generator ends.
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

    Raises
    ------
    ValueError
        If there are more batches than threads could wait for, or an input is not finite.
    """
    views = layer_views(model, layers)
    most = MOST_PASSES // 2 if paired else MOST_PASSES
    drawn = list(
        itertools.islice(zip(checked(batches), batch_states(model), strict=False), most + 1)
    )
    if len(drawn) > most:
        raise ValueError(
            f"calibration must have at most {most} batches for sequential calibration"
            f"{' with feedback' if paired else ''}, got more: make them larger, or choose "
            "sequential=False."
        )
    traces = Traces(model)
    with eval_mode(model):
        try:
            seen = survey(model, views, drawn, traces)
            started = _Replay(model, views, seen, paired)
            if not started.is_faithful(started.batches(Pass, drawn), folder):
                seen = dataclasses.replace(seen, interferes=True)
                started = _Replay(model, views, seen, paired)
            traces.restore()
            del views  # layers that are replaced need not stay in memory
            whole = started.batches(functools.partial(WholePass, traces=traces), drawn)
            yield from started.through_blocks(started.batches(Pass, drawn), folder)
            yield from started.repeated(whole)
        finally:
            traces.restore()


class _UnlikeError(Exception):
    """A layer is given something else than in the survey."""


class _Replay:
    """Which layers are left, and which batches wait where.

    Attributes
    ----------
    blocks : dict of str to dict
        Layers that have not had their turn, by the block in which they have it.
    pending : OrderedDict of str to Matricized
        Those of them that are in no block, as batches cannot come to them one by one.
    dense : dict of str to torch.nn.Module
        Layers as they were, of those that dense passes may come to again.
    """

    def __init__(self, model: nn.Module, views: _Views, seen: Survey, paired: bool) -> None:
        self._model, self._seen, self._is_paired = model, seen, paired
        self.pending = OrderedDict((name, views[name]) for name in seen.repeated)
        once = {name: view for name, view in views.items() if name not in self.pending}
        self.blocks = _blocks(model, once, seen)
        self._in_blocks = {name for views in self.blocks.values() for name in views}
        self.dense: dict[str, nn.Module] = {}

    def batches(self, kind: Any, drawn: list[tuple[Any, RandomState]]) -> list[Arrived]:
        """Return all batches, none of which has started."""
        found = []
        for i, (each, calls) in enumerate(zip(drawn, self._seen.calls, strict=True)):
            dense = kind(self._model, *each) if self._is_paired else None
            found.append(Arrived(i, calls, kind(self._model, *each), dense))
        return found

    def through_blocks(self, batches: list[Arrived], folder: Path | None) -> Stops:
        """Lead batches from block to block, and stop at the layers of each."""
        every: list[Any] = [each for b in batches for each in (b.own, b.dense) if each is not None]
        with self._started(every, folder) as opened:
            while name := self._next(every):
                as_dense = self._as_dense(self.blocks[name])
                arrived = [batch for batch in batches if batch.own.at == name]
                yield from self._at(name, arrived, as_dense)
                if not any(self.blocks.values()):  # what comes behind does not matter
                    break
                if arrived:
                    opened[name].set()
                for dense in (batch.dense for batch in batches):
                    if dense is not None and dense.at == name:
                        with as_dense():
                            dense.advance()
                for batch in arrived:
                    batch.own.advance()
                forget(self._model.get_submodule(name))

    def is_faithful(self, batches: list[Arrived], folder: Path | None) -> bool:
        """Whether passes that wait for each other, and trials, are what passes one by one are.

        They are not where blocks read what others write to objects, classes or ``threading.local``,
        or if modules that are handed over call blocks.
        """
        passes, left = [batch.own for batch in batches], set(self.blocks)
        missed = [self._in_blocks & batch.calls.keys() for batch in batches]

        def compare(index: int, name: str, x: Tensor) -> None:
            if not are_alike(mark(x), self._seen.marks[index][name]):
                raise _UnlikeError
            missed[index].discard(name)

        try:
            with self._started(passes, folder):
                while left and (name := self._next(passes)):
                    arrived = [(i, each) for i, each in enumerate(passes) if each.at == name]
                    for i, each in arrived:
                        each.visit(self.blocks[name], functools.partial(compare, i))
                    left.discard(name)
                    for _, each in arrived if left else ():
                        each.advance()
        except (OSError, MemoryError, torch.OutOfMemoryError):  # a full disk, for one
            raise
        except Exception:  # one by one, they have passed
            return False
        return not any(missed)

    @contextlib.contextmanager
    def _started(
        self, passes: list[Any], folder: Path | None
    ) -> Iterator[dict[str, threading.Event]]:
        """Lead passes to the first block, and end them after."""
        with contextlib.ExitStack() as hooks:
            opened = {
                name: hooks.enter_context(waiting_before(self._model, name)) for name in self.blocks
            }
            for name, _ in between(self._model, self.blocks):
                if name not in self.blocks:
                    hooks.enter_context(waiting_before(self._model, name)).set()
            hooks.enter_context(offloading(self._model, self.blocks, folder))
            try:
                for each in passes if self.blocks else ():
                    each.advance()
                yield opened
            finally:
                for each in passes:
                    each.cancel()

    def _next(self, passes: list[Any]) -> str | None:
        """Return the first block before which one waits."""
        waiting = {each.at for each in passes}
        return next((name for name in self.blocks if name in waiting), None)

    def _at(self, block: str, arrived: list[Arrived], as_dense: _Mode) -> Stops:
        """Yield the layers of a block in the order in which its batches call them."""
        views = self.blocks[block]
        while views and arrived:
            found = Collected(self._model, views, arrived, as_dense).statistics
            if not found:  # no batch calls any of them
                break
            forget(self._model.get_submodule(block))
            for name in list(found):
                del views[name]
                yield name, found.pop(name)

    def repeated(self, batches: list[Arrived]) -> Stops:
        """Yield the layers that are in no block, each in runs of the whole network."""
        while self.pending:
            name, view = self.pending.popitem(last=False)
            as_dense = self._as_dense({name: view})
            statistics = Collected(self._model, {name: view}, batches, as_dense).statistics
            del view  # memory
            forget(self._model)
            for each in statistics.values() if self._seen.interferes else ():
                each.note = "; ".join(filter(None, (each.note, _WHOLE)))
            yield from statistics.items()

    def _as_dense(self, views: _Views) -> _Mode:
        """Return what makes the network dense, in these layers and those that came before."""
        if not self._is_paired:
            return contextlib.nullcontext
        layers = {view.layer for view in views.values()}
        modules = self._model.named_modules(remove_duplicate=False)
        present = {**self.dense, **{name: module for name, module in modules if module in layers}}
        if self._seen.repeated:
            self.dense = present
        return functools.partial(_holding, self._model, present)


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
    for name in list(blocks):  # passes do not wait inside of blocks
        if outer := [each for each in _around(_parent(name)) if each in blocks]:
            blocks[outer[-1]].update(blocks.pop(name))
    return blocks


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> Iterator[str]:
    """Yield the names of a module and of those around it, from the inside out."""
    while name:
        yield name
        name = _parent(name)


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
