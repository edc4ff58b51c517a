"""A pass over all batches that stops at each layer, so that the layer can be replaced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from matfact.calibration import InputStatistics, OutputStatistics
from matfact.torch import _memory
from matfact.torch._batches import attended, checked, eval_mode
from matfact.torch._cache import forget
from matfact.torch._matrices import LayerStatistics, Matricized
from matfact.torch._offload import offloading
from matfact.torch._passes import Pass, Stopped, gate
from matfact.torch.capture import layer_views

Stops = Generator[tuple[str, LayerStatistics]]
_Views = dict[str, Matricized]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]
#: A tensor and the number of its changes in place, None where that is not counted.
_State = tuple[Tensor, int | None]


def walk(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    paired: bool = False,
    folder: Path | None = None,
) -> Stops:
    """Stop a pass over all batches at each layer, and go on with the layer that is there then.

    Every batch goes through the network once, as far as the last of `layers`, in a thread of its
    own that waits before each block with one of them. When all have come to a block, they run
    through it one after the other up to its first layer; the name of that and the statistics of its
    inputs are yielded, the caller may replace the layer, and the batches start again for the next
    one, which sees what the replacement makes of the inputs. In memory are one Gram matrix, what
    enters the block of all batches, and what one batch makes of it: many small batches take the
    least.

    A block is what a list of modules holds, such as a layer of a transformer; a layer that is in
    none is one by itself.

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
        Name of a layer that was called; each comes once, from its first call in each batch.
    statistics : list of InputStatistics or list of OutputStatistics
        One for each of its groups; of pairs, those of the dense network are the outputs.
    """
    blocks = _blocks(model, layer_views(model, layers))
    order = {name: i for i, name in enumerate(blocks)}
    passes = [Pass(model, batch) for batch in checked(batches)]
    twins = {own: Pass(model, own.batch) for own in passes} if paired else {}
    every = [*passes, *twins.values()]
    with eval_mode(model), contextlib.ExitStack() as gates:
        opened = {name: gates.enter_context(gate(model, name)) for name in blocks}
        gates.enter_context(offloading(model, blocks, folder))
        try:
            for each in every:
                each.advance()
            while waiting := [each.at for each in every if each.at is not None]:
                name = min(waiting, key=order.__getitem__)
                arrived = {own: twins.get(own) for own in passes if own.at == name}
                dense = [twin for twin in twins.values() if twin.at == name]
                as_dense = _as_now(model, blocks[name] if dense else {})
                yield from _stops(model.get_submodule(name), blocks[name], arrived, as_dense)
                if not any(blocks.values()):  # what comes behind the last layer does not matter
                    break
                if arrived:
                    opened[name].set()
                for twin in dense:
                    with as_dense():
                        twin.advance()
                for own in arrived:
                    own.advance()
                forget(model.get_submodule(name))
        finally:
            for each in every:
                each.cancel()


def _blocks(model: nn.Module, views: Mapping[str, Matricized]) -> dict[str, _Views]:
    """Return the layers of each block, by the name of the block."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {name for name in modules if isinstance(modules[_parent(name)], lists)}
    innermost = {name: next((p for p in _around(name) if p in held), name) for name in views}
    chosen = set(innermost.values())
    blocks: dict[str, _Views] = {}
    for name, block in innermost.items():
        *_, outermost = (p for p in _around(block) if p in chosen)
        blocks.setdefault(outermost, {})[name] = views[name]
    return blocks


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _around(name: str) -> Iterator[str]:
    """Yield the names of a module and of those around it, from the inside out."""
    while name:
        yield name
        name = _parent(name)


def _stops(
    block: nn.Module, views: _Views, arrived: Mapping[Pass, Pass | None], as_dense: _Mode
) -> Stops:
    """Yield the layers of a block in the order in which the batches that wait there call them."""
    while views and arrived:
        found = _Found(views)
        for own, twin in arrived.items():
            found.add(own, twin, as_dense)
        if not found.names:  # no batch calls any of them
            break
        forget(block)
        for name in found.names:
            del views[name]
            yield name, found.statistics
            _memory.trim()  # of what the caller has made of them


def _as_now(model: nn.Module, views: _Views) -> _Mode:
    """Return a context in which the network has the layers that it has now."""
    layers = {view.layer for view in views.values()}
    modules = model.named_modules(remove_duplicate=False)
    return functools.partial(_holding, model, {n: m for n, m in modules if m in layers})


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


class _Found:
    """The first layer of a block that is called, and those that are given the same inputs.

    Attributes
    ----------
    names : list of str
        Their names; none where no batch calls a layer.
    statistics : list of InputStatistics or list of OutputStatistics
        Those of the inputs.
    """

    def __init__(self, views: _Views) -> None:
        self._views = views
        self.names: list[str] = []
        self.statistics: Any = []

    def add(self, own: Pass, twin: Pass | None, as_dense: _Mode) -> None:
        """Let a batch come to the layer, with its twin in the dense network if it has one."""
        dense: Tensor | None = None
        if twin is not None and twin.at == own.at:
            with as_dense():
                dense = self._input(twin)
        entered: dict[str, _State] = {}
        expected = set(self.names or self._views)

        def visit(name: str, x: Tensor) -> None:
            state = x, None if x.is_inference() else x._version
            if entered and not self._shares(name, state, *next(iter(entered.items()))):
                raise Stopped
            if not entered:
                if not self._is_wanted(name):  # which this batch calls before
                    return
                inputs = [x] if twin is None else [x, _matching(dense, x)]
                self._count(name, [attended(each, own.batch) for each in inputs])
            entered[name] = state
            if entered.keys() >= expected:
                raise Stopped

        own.visit(self._views, visit)
        if entered:
            self.names = [name for name in self.names or entered if name in entered]

    def _input(self, twin: Pass) -> Tensor | None:
        """Return what enters the layer in the dense network, None if it is not called there."""
        found: list[Tensor] = []

        def visit(name: str, x: Tensor) -> None:
            if self._is_wanted(name):
                found.append(x)
                raise Stopped

        twin.visit(self._views, visit)
        return found[0] if found else None

    def _is_wanted(self, name: str) -> bool:
        return not self.names or name == self.names[0]

    def _shares(self, name: str, state: _State, first: str, entered: _State) -> bool:
        """Whether a layer is given what the first one was, as query, key and value are."""
        (x, version), (y, before) = state, entered
        by_rows = all(self._views[each].by_rows for each in (name, first))
        return by_rows and x is y and version is not None and version == before

    def _count(self, name: str, inputs: Sequence[Tensor]) -> None:
        if not self.statistics:
            kind = InputStatistics if len(inputs) == 1 else OutputStatistics
            self.statistics = [kind() for _ in self._views[name].matrices()]
        self._views[name].update(self.statistics, *inputs)


def _matching(dense: Tensor | None, x: Tensor) -> Tensor:
    """Return the input in the dense network, or that now where they cannot be compared."""
    return x if dense is None or dense.shape != x.shape else dense
