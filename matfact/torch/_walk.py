"""A pass over all batches that stops at each layer, so that the layer can be replaced."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch._batches import attended, checked, eval_mode, forward
from matfact.torch._matrices import LayerStatistics, Matricized
from matfact.torch.capture import layer_input, layer_views


def walk(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Any], *, paired: bool = False
) -> Generator[tuple[str, LayerStatistics]]:
    """Stop a pass over all batches at each layer, and go on with the layer that is there then.

    Every batch runs through the network once, in a thread of its own that waits at each of
    `layers`. When all have come to a layer, its name and the statistics of its inputs are yielded;
    the caller may replace the layer, and later layers see what the replacement makes of the
    inputs. The network's own code calls everything with its own arguments, so that any network
    can be walked. One Gram matrix is kept at a time, and what the forward passes hold of all
    batches: a few large batches are best.

    Parameters
    ----------
    model : torch.nn.Module
        The network, which is in eval mode until the walk ends.
    layers : sequence of str
        Names of linear or convolutional layers. Where a network calls them in another order, that
        of `layers` decides between batches that wait at different ones.
    batches : iterable
        As for :func:`input_statistics`.
    paired : bool, default=False
        Whether each batch also runs through the layers as they were, in a second pass beside the
        first, so that inputs are known together with those in the dense network.

    Yields
    ------
    name : str
        Name of a layer that was called; each comes once, from its first call in each batch.
    statistics : list of InputStatistics or list of OutputStatistics
        One for each of its groups; of pairs, those of the dense network are the outputs.
    """
    views = layer_views(model, layers)
    order = {name: i for i, name in enumerate(views)}
    passes = [_Pass(model, batch) for batch in checked(batches)]
    if paired:
        for batch in passes:
            batch.twin = _Pass(model, batch.batch, dense=True)
    shared = _SharedInputs()
    with eval_mode(model), contextlib.ExitStack() as gates:
        opened = {n: gates.enter_context(_gate(model, n, v.layer)) for n, v in views.items()}
        try:
            for batch in passes:
                batch.advance()
            while waiting := [batch for batch in passes if batch.at is not None]:
                name = min((batch.at for batch in waiting if batch.at), key=order.__getitem__)
                arrived = [batch for batch in waiting if batch.at == name]
                yield name, shared.statistics(views.pop(name), arrived)
                opened[name].set()
                for batch in arrived:
                    batch.advance()
        finally:
            for batch in passes:
                batch.cancel()


@contextlib.contextmanager
def _gate(model: nn.Module, name: str, layer: nn.Module) -> Iterator[threading.Event]:
    """Make batches wait at `layer` until the event yielded is set."""
    opened = threading.Event()
    own, patched = type(layer).forward, vars(layer).get("forward")  # by another library before
    reference = weakref.ref(layer)  # what has been replaced need not stay in memory

    def forward_at_gate(*args: Any, **kwargs: Any) -> Any:
        batch = _Pass.of_this_thread()
        if batch is not None and not opened.is_set():
            batch.wait_at(name, layer_input(args, kwargs))
        present, before = model.get_submodule(name), reference()
        if present is not before and not (batch is not None and batch.dense):
            return present(*args, **kwargs)
        return patched(*args, **kwargs) if patched else own(before, *args, **kwargs)

    layer.forward = forward_at_gate
    del layer
    try:
        yield opened
    finally:
        remaining = reference()
        if remaining is not None and patched:
            remaining.forward = patched
        elif remaining is not None:
            del remaining.forward


class _Cancelled(BaseException):
    """Ends a pass that nobody waits for; no ``except Exception`` in a model may catch it."""


class _Pass:
    """One batch on its way through the network, in a thread that halts at gates.

    Attributes
    ----------
    batch : object
        What the network is called with.
    dense : bool
        Whether it goes through the layers that were there at first.
    at : str or None
        Name of the layer where it waits.
    twin : _Pass or None
        The pass of the same batch through the dense network, which advances with this one.
    """

    _local = threading.local()

    def __init__(self, model: nn.Module, batch: Any, *, dense: bool = False) -> None:
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model,), daemon=True)
        self._cancelled = False
        self._error: BaseException | None = None
        self.batch, self.dense = batch, dense
        self.at: str | None = None
        self.twin: _Pass | None = None
        self.input: Tensor = torch.empty(0)

    @property
    def dense_input(self) -> Tensor:
        """What the twin brings to the same layer, where it has come there too."""
        twin = self.twin
        if twin is None or twin.at != self.at or twin.input.shape != self.input.shape:
            return self.input
        return twin.input

    @classmethod
    def of_this_thread(cls) -> _Pass | None:
        """Return the pass whose thread asks, if it is one's."""
        return getattr(cls._local, "current", None)

    def _run(self, model: nn.Module) -> None:
        self._local.current = self
        try:
            with torch.no_grad():  # each thread has its own mode
                forward(model, self.batch)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halted.release()

    def wait_at(self, name: str, x: Tensor) -> None:
        """Halt until advanced (called by the thread itself)."""
        self.at, self.input = name, x
        self._halted.release()
        self._go.acquire()
        self.at, self.input = None, torch.empty(0)
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> None:
        """Let the batch run to the next gate or to its end, and raise what went wrong there."""
        if self.twin is not None and (self.twin.at == self.at):
            self.twin.advance()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the thread where it waits, and that of its twin."""
        if self.twin is not None:
            self.twin.cancel()
        self._cancelled = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()


class _SharedInputs:
    """Statistics that several layers in a row can share, as query, key and value do."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []
        self._statistics: LayerStatistics = []

    def statistics(self, view: Matricized, arrived: list[_Pass]) -> LayerStatistics:
        """Return the statistics of what has arrived, those of the last call if it is the same."""
        inputs = [x for batch in arrived for x in (batch.input, batch.dense_input)]
        # The patches of convolutions depend on more than their inputs.
        plain = not hasattr(view.layer, "kernel_size") and not any(x.is_inference() for x in inputs)
        seen = [(x, x._version) for x in inputs] if plain else []
        same = len(seen) == len(self._seen) > 0 and all(
            x is y and version == before
            for (x, version), (y, before) in zip(seen, self._seen, strict=True)
        )
        if not same:
            self._statistics = _statistics(view, arrived)
        self._seen = seen
        return self._statistics


def _statistics(view: Matricized, arrived: list[_Pass]) -> LayerStatistics:
    inputs = [attended(batch.input, batch.batch) for batch in arrived]
    if arrived[0].twin is None:
        return view.statistics(inputs)
    dense = [attended(batch.dense_input, batch.batch) for batch in arrived]
    return view.paired_statistics(list(zip(inputs, dense, strict=True)))
