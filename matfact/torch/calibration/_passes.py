"""Batches on their way through a network, which wait where they are told to and can go back."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_input
from matfact.torch.layers._matricized import Matricized
from matfact.torch.running._batches import duplicate, forward
from matfact.torch.running._mapped import page_out
from matfact.torch.running._random import RandomState, drawing
from matfact.torch.running._traces import Traces

#: Called with the name and the input of a layer.
Visitor = Callable[[str, Tensor], None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Stopped(BaseException):
    """Ends a trial run; no ``except Exception`` in a model may catch it."""


class _Cancelled(BaseException):
    """Ends a pass that nobody waits for."""


class Pass:
    """One batch on its way through the network, in a thread that halts at gates.

    The network's own code calls everything with its own arguments, and in its own modes of
    gradients and precision, so that any network can be passed.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : object
        What it is called with.
    draws : RandomState
        Where the random numbers that it draws start. Passes to compare are given the same.

    Attributes
    ----------
    at : str or None
        Name of the module before which it waits.
    offloaded : set of mmap.mmap
        Files that hold tensors of the pass, as long as it needs them.
    """

    _local = threading.local()

    def __init__(self, model: nn.Module, batch: Any, draws: RandomState) -> None:
        self._draws = draws
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, model), daemon=True)
        self._precisions = _autocast()
        self._cancelled = self._trial = False
        self._error: BaseException | None = None
        self._arguments: Arguments = (), {}
        self.batch = batch
        self.at: str | None = None
        self.offloaded: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    @classmethod
    def advancing(cls) -> Pass | None:
        """Return the pass whose thread asks, if it is one's that does not wait already."""
        present: Pass | None = getattr(cls._local, "current", None)
        return None if present is None or present.at is not None else present

    def _run(self, model: nn.Module) -> None:
        self._local.current = self
        try:
            with torch.no_grad(), contextlib.ExitStack() as modes:  # each thread has its own
                for precision in self._precisions:
                    modes.enter_context(precision)
                forward(model, self.batch)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halted.release()

    def halt(self, name: str, run: Callable[..., Any], arguments: Arguments) -> None:
        """Wait until advanced, and try `run` whenever that is wanted (called by the thread)."""
        self.at, self._arguments = name, arguments
        while True:
            page_out(self.offloaded)
            self._halted.release()
            self._go.acquire()
            if self._cancelled:
                raise _Cancelled
            if not self._trial:
                break
            with contextlib.suppress(Stopped):
                try:
                    _called(run, arguments)
                except Exception as error:
                    self._error = error
        self.at, self._arguments = None, ((), {})

    def advance(self) -> None:
        """Let the batch run to the next gate or to its end, and raise what went wrong there."""
        with drawing(self._draws):
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._go.release()
            self._wait()
            self._draws = self._draws.renewed()

    def visit(self, views: dict[str, Matricized], visitor: Visitor) -> None:
        """Let a copy of the batch run through the module where it waits.

        Parameters
        ----------
        views : dict of str to Matricized
            Layers in that module, or the module itself.
        visitor : callable
            Called by each of these that is come to; it may raise :class:`Stopped`.
        """
        if self.at in views:
            with contextlib.suppress(Stopped):
                visitor(self.at, layer_input(*self._arguments))
            page_out(self.offloaded)
            return
        self._trial = True
        with _hooked(views, visitor), drawing(self._draws):
            self._go.release()
            self._wait()
        self._trial = False

    def _wait(self) -> None:
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the thread where it waits."""
        self._cancelled = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()


class WholePass:
    """A batch that can go through the whole network, again and again, without a stop.

    Parameters
    ----------
    model, batch, draws
        As for :class:`Pass`.
    traces : Traces
        What passes may leave in the network, restored after each.
    """

    at = None

    def __init__(self, model: nn.Module, batch: Any, draws: RandomState, traces: Traces) -> None:
        self._model, self._draws, self._traces = model, draws, traces
        self.batch = batch

    def visit(self, views: dict[str, Matricized], visitor: Visitor) -> None:
        """Let the batch run through the network, as :meth:`Pass.visit` does through a module."""
        with _hooked(views, visitor), drawing(self._draws), torch.no_grad():
            try:
                with contextlib.suppress(Stopped):
                    forward(self._model, self.batch)
            finally:
                self._traces.restore()


def _autocast() -> list[torch.autocast]:
    """Return the automatic precisions that are on in this thread."""
    return [
        torch.autocast(device, dtype=torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]


def _called(run: Callable[..., Any], arguments: Arguments) -> None:
    """Call `run` with a copy of the arguments, which it may write to, as caches are."""
    memo: dict[int, Any] = {}
    copied = functools.partial(duplicate, memo=memo)
    args, kwargs = arguments
    run(*map(copied, args), **{key: copied(value) for key, value in kwargs.items()})


@contextlib.contextmanager
def _hooked(views: dict[str, Matricized], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` with the name and the input of each layer that is called."""

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args, kwargs: visitor(name, layer_input(args, kwargs))

    with contextlib.ExitStack() as handles:
        for name, view in views.items():
            handle = view.layer.register_forward_pre_hook(hook(name), with_kwargs=True)
            handles.callback(handle.remove)
        yield


@contextlib.contextmanager
def gate(model: nn.Module, name: str) -> Iterator[threading.Event]:
    """Make passes wait before the module `name` until the event yielded is set."""
    opened = threading.Event()
    module: Any = model.get_submodule(name)
    own, patched = type(module).forward, vars(module).get("forward")  # by another library before

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        return patched(*args, **kwargs) if patched else own(module, *args, **kwargs)

    reference = weakref.ref(module)  # what has been replaced need not stay in memory

    def forward_at_gate(*args: Any, **kwargs: Any) -> Any:
        before: Any = reference()
        comer = Pass.advancing()
        if comer is not None and not opened.is_set():
            comer.halt(name, functools.partial(run, before), (args, kwargs))
        now = model.get_submodule(name)
        # Without the hooks of a replacement: they are those of the layer that is being called.
        return run(before, *args, **kwargs) if now is before else now.forward(*args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):  # of compiled code
        signature = inspect.signature(module.forward)
        forward_at_gate.__signature__ = signature  # type: ignore[attr-defined]
    forward_at_gate.is_gate = True  # type: ignore[attr-defined]
    module.forward = forward_at_gate
    # Where torch sees a hook, its attention calls all modules instead of reading their weights.
    seen = module.register_forward_pre_hook(lambda *_: None)
    del module
    try:
        yield opened
    finally:
        seen.remove()
        remaining: Any = reference()
        if remaining is not None and patched:
            remaining.forward = patched
        elif remaining is not None:
            del remaining.forward
