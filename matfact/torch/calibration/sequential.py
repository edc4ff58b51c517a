"""Sequential calibration: a pass over all batches that stops at each layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration._collect import Arrived, Collected
from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside
from matfact.torch.calibration._match import Example, Matched, match_block
from matfact.torch.calibration._offload import between, offloading
from matfact.torch.calibration._passes import Pass, WholePass, waiting_before
from matfact.torch.calibration._survey import Survey, are_alike, mark, survey
from matfact.torch.calibration.statistics import layer_views
from matfact.torch.layers._derived import forget
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import checked, eval_mode
from matfact.torch.running._random import RandomState, batch_states
from matfact.torch.running._traces import Traces
from matfact.torch.training._values import first_tensor

_WHOLE = "calibrated in runs of the whole network, since batches cannot wait before its blocks"
#: Maximum number of waiting passes, each in a thread of about 0.1 MB.
MOST_PASSES = 2048

Stops = Generator[tuple[str, LayerStatistics]]
_Views = dict[str, Matricized]
_Match = Callable[[str, Callable[[], Matched]], None]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]


def sequential_statistics(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    paired: bool = False,
    folder: Path | None = None,
    known: Collection[str] = (),
    match: _Match | None = None,
) -> Stops:
    """Run all batches through the network, stopping at each layer so that it can be replaced.

    A survey pass of the dense network records how often each batch calls each layer, and checks
    that all inputs are finite. Then every batch passes through the network once, up to the last of
    `layers`, in its own thread, which waits before each block with one of them. When all batches
    have arrived at a block, each is run up to the first layer in it. The layer's name and the
    statistics of its inputs, over all calls, are yielded, and the caller may replace the layer. The
    block is then replayed for its next layer, which sees the outputs of the replacement. Memory
    holds the Gram matrices of one layer, the inputs of the block for all batches, and the
    activations of one batch, so many small batches take the least.

    First, all batches pass through the dense network in the same way. If the inputs of a layer then
    differ from those in the survey, for example because blocks read data written by other batches
    or threads, all layers are calibrated one by one.

    A block is an entry of a list of modules, such as a transformer layer; a layer outside of such
    lists is its own block. Starting with the first layer that is called more than once, or in
    different orders, layers are calibrated one by one, in runs of the whole network. So are all
    layers if passes leave tensors in the network's modules. All passes of a batch draw the same
    random numbers, and leave nothing in the network.

    Parameters
    ----------
    model : torch.nn.Module
        The network, in eval mode until the generator ends.
    layers : sequence of str
        Names of linear or convolutional layers. If batches wait before different blocks, the order
        of `layers` decides which block comes first.
    batches : iterable
        As in `input_statistics`.
    paired : bool, default=False
        Whether each batch also passes through the original layers, so that inputs come in pairs
        with those in the dense network.
    folder : Path, optional
        Folder for the block inputs of waiting batches, in files instead of memory.
    known : collection of str
        Layers whose statistics are not needed: they come in turn, with empty ones.
    match : callable, optional
        Called for each block once its layers are replaced, with its name and a function that trains
        it to give the outputs of the dense one, and returns the result. It needs pairs.

    Yields
    ------
    name : str
        Name of a called layer; each comes once.
    statistics : LayerStatistics
        Statistics of its inputs.

    Raises
    ------
    ValueError
        If there are too many batches for waiting threads, or an input is not finite.
    """
    views = layer_views(model, layers)
    most = MOST_PASSES // 2 if paired else MOST_PASSES
    drawn = list(
        itertools.islice(zip(checked(batches), batch_states(model), strict=False), most + 1)
    )
    if len(drawn) > most:
        raise ValueError(
            f"calibration must have at most {most} batches for sequential calibration"
            f"{' with feedback' if paired else ''}, got more: make them larger, or set "
            "sequential=False."
        )
    traces = Traces(model)
    with eval_mode(model):
        try:
            seen = survey(model, views, drawn, traces)
            started = _Replay(model, views, seen, paired, known)
            if not started.is_faithful(started.batches(Pass, drawn), folder):
                seen = dataclasses.replace(seen, interferes=True)
                started = _Replay(model, views, seen, paired, known)
            traces.restore()
            del views  # do not keep replaced layers in memory
            whole = started.batches(functools.partial(WholePass, traces=traces), drawn)
            yield from started.through_blocks(started.batches(Pass, drawn), folder, match)
            yield from started.repeated(whole)
        finally:
            traces.restore()


class _UnlikeError(Exception):
    """The inputs of a layer differ from those in the survey."""


class _Replay:
    """State of sequential calibration: remaining layers and waiting batches.

    Attributes
    ----------
    blocks : dict of str to dict
        Remaining layers by block.
    pending : OrderedDict of str to Matricized
        Remaining layers without a block, which batches do not reach one by one.
    dense : dict of str to torch.nn.Module
        Original layers that dense passes may still reach.
    """

    def __init__(
        self, model: nn.Module, views: _Views, seen: Survey, paired: bool, known: Collection[str]
    ) -> None:
        self._model, self._seen, self._is_paired, self._known = model, seen, paired, known
        self.pending = OrderedDict((name, views[name]) for name in seen.repeated)
        once = {name: view for name, view in views.items() if name not in self.pending}
        self.blocks = _blocks(model, once, seen)
        self._in_blocks = {name for views in self.blocks.values() for name in views}
        self.dense: dict[str, nn.Module] = {}

    def batches(self, kind: Any, drawn: list[tuple[Any, RandomState]]) -> list[Arrived]:
        """Return all batches, not yet started."""
        found = []
        for i, (each, calls) in enumerate(zip(drawn, self._seen.calls, strict=True)):
            dense = kind(self._model, *each) if self._is_paired else None
            found.append(Arrived(i, calls, kind(self._model, *each), dense))
        return found

    def through_blocks(
        self, batches: list[Arrived], folder: Path | None, match: _Match | None = None
    ) -> Stops:
        """Advance batches from block to block, stopping at the layers of each."""
        every: list[Any] = [each for b in batches for each in (b.own, b.dense) if each is not None]
        with self._started(every, folder) as opened:
            while name := self._next(every):
                as_dense = self._as_dense(self.blocks[name])
                arrived = [batch for batch in batches if batch.own.at == name]
                is_layer = name in self.blocks[name]
                yield from self._at(name, arrived, as_dense)
                if match is not None and arrived and not is_layer:
                    match(name, functools.partial(self._match, name, arrived, as_dense))
                if not any(self.blocks.values()):  # nothing after this matters
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
        """Whether interleaved passes and replays give the same inputs as passes one by one.

        They do not if blocks read what others write to objects, classes or ``threading.local``, or
        if modules passed as arguments call blocks.
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
        except (OSError, MemoryError, torch.OutOfMemoryError):  # such as a full disk
            raise
        except Exception:  # passes one by one have succeeded
            return False
        return not any(missed)

    @contextlib.contextmanager
    def _started(
        self, passes: list[Any], folder: Path | None
    ) -> Iterator[dict[str, threading.Event]]:
        """Start passes up to the first block, and end them afterwards."""
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
        """Return the first block with a waiting pass."""
        waiting = {each.at for each in passes}
        return next((name for name in self.blocks if name in waiting), None)

    def _at(self, block: str, arrived: list[Arrived], as_dense: _Mode) -> Stops:
        """Yield the layers of a block in the order of their calls."""
        views = self.blocks[block]
        while views and arrived:
            found = Collected(self._model, views, arrived, as_dense, self._known).statistics
            if not found:  # no batch calls any of them
                break
            forget(self._model.get_submodule(block))
            for name in list(found):
                del views[name]
                yield name, found.pop(name)

    def _match(self, name: str, arrived: list[Arrived], as_dense: _Mode) -> Matched:
        """Train a block to give the outputs that it gives in the dense network."""
        if any(batch.dense.at != name for batch in arrived):
            return Matched(name, note="its batches have no counterparts in the dense network")
        try:
            with as_dense():
                targets = [first_tensor(batch.dense.output()) for batch in arrived]
            examples = [
                Example(batch.own.output, target, batch.own.batch, is_aside(batch.index))
                for batch, target in zip(arrived, targets, strict=True)
            ]
            return match_block(name, self._model, examples)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the network's own code, or in its gradients
            return Matched(name, note=f"it cannot be trained: {error}")
        finally:
            forget(self._model.get_submodule(name))

    def repeated(self, batches: list[Arrived]) -> Stops:
        """Yield the layers without a block, each in runs of the whole network."""
        while self.pending:
            views = dict([self.pending.popitem(last=False)])
            as_dense = self._as_dense(views)
            statistics = Collected(self._model, views, batches, as_dense, self._known).statistics
            del views  # memory
            forget(self._model)
            for each in statistics.values() if self._seen.interferes else ():
                each.note = "; ".join(filter(None, (each.note, _WHOLE)))
            yield from statistics.items()

    def _as_dense(self, views: _Views) -> _Mode:
        """Return a context that makes these layers and all earlier ones dense."""
        if not self._is_paired:
            return contextlib.nullcontext
        layers = {view.layer for view in views.values()}
        modules = self._model.named_modules(remove_duplicate=False)
        present = {**self.dense, **{name: module for name, module in modules if module in layers}}
        if self._seen.repeated:
            self.dense = present
        return functools.partial(_holding, self._model, present)


def _blocks(model: nn.Module, views: Mapping[str, Matricized], seen: Survey) -> dict[str, _Views]:
    """Return the layers of each block reached by batches, by the name of the block."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {name for name in modules if name and isinstance(modules[_parent(name)], lists)}
    innermost = {name: next((p for p in _around(name) if p in held), name) for name in views}
    chosen = set(innermost.values())
    blocks: dict[str, _Views] = {}
    for name, block in innermost.items():
        if name not in seen.around:  # no batch reaches it
            continue
        *_, outermost = (p for p in _around(block) if p in chosen)
        around = seen.around[name]
        blocks.setdefault(outermost if outermost in around else around[-1], {})[name] = views[name]
    for name in list(blocks):  # passes do not wait inside blocks
        if outer := [each for each in _around(_parent(name)) if each in blocks]:
            blocks[outer[-1]].update(blocks.pop(name))
    return blocks


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> Iterator[str]:
    """Yield the names of a module and its ancestors, from the inside out."""
    while name:
        yield name
        name = _parent(name)


@contextlib.contextmanager
def _holding(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `layers` into the network and restore the previous ones afterwards."""
    present = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in present.items():
            model.set_submodule(name, layer)
