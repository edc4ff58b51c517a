"""Batches on their way through a network, which wait where they are told to and can go back."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
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


class Stopped(BaseException):
    """Ends a trial run; no ``except Exception`` in a model may catch it."""


class _Cancelled(BaseException):
    """Ends a pass that is no longer needed."""


class Pass:
    """One batch on its way through the network, in a thread that waits where it is told to.

    The network's own code calls everything with its own arguments, so that any network can be
    passed. The thread holds the place in that code. Modules are run by the thread that
    advances the pass, in the grad and autocast modes of the pass. So threads that wait hold
    neither workers nor work space.

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
        self._modes = dataclasses.replace(_Modes.now(), gradients=False, inference=False)
        self._cancelled = False
        self._error: BaseException | None = None
        self._call: _Call | None = None
        self.batch = batch
        self.offloaded: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    @property
    def at(self) -> str | None:
        return None if self._call is None else self._call.name

    @classmethod
    def advancing(cls) -> Pass | None:
        """Return the pass whose thread asks."""
        present: Pass | None = getattr(cls._local, "current", None)
        return present

    def _run(self, model: nn.Module) -> None:
        self._local.current = self
        try:
            with self._modes.entered():  # each thread has its own
                forward(model, self.batch)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halted.release()

    def wait_for(self, call: _Call) -> Any:
        """Wait until advanced, and return what comes of going on (called by the thread)."""
        if not self._cancelled:  # else it is code that cleans up, for which nobody waits
            self._call = call
            page_out(self.offloaded)
            self._halted.release()
            self._go.acquire()
            self._call = None
        if self._cancelled:
            raise _Cancelled
        return call.result()

    def advance(self) -> None:
        """Let the batch run to where it waits next, or to its end, and raise what went wrong."""
        with drawing(self._draws):
            if self._thread.ident is None:
                self._thread.start()
                self._halted.acquire()
            else:
                self._go_on()
            while self._call is not None and self._call.name is None:
                self._go_on()
            if self._error is not None:
                raise self._error
            self._draws = self._draws.renewed()

    def _go_on(self) -> None:
        if self._call is not None:
            self._call.finish()
        self._go.release()
        self._halted.acquire()

    def visit(self, views: dict[str, Matricized], visitor: Visitor) -> None:
        """Let a copy of the batch run through the module where it waits.

        Parameters
        ----------
        views : dict of str to Matricized
            Layers in that module, or the module itself.
        visitor : callable
            Called by each of these that is come to; it may raise :class:`Stopped`.
        """
        assert self._call is not None
        if (name := self._call.name) in views:
            with contextlib.suppress(Stopped):
                visitor(name, layer_input(self._call.args, self._call.kwargs))
        else:
            # What the module raises is for the network's own code, when the pass goes on.
            ignoring = contextlib.suppress(Exception)
            with _visiting(views, visitor), drawing(self._draws), ignoring:
                self._call.try_out()
        page_out(self.offloaded)

    def cancel(self) -> None:
        """End the thread where it waits."""
        self._cancelled = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()


class _Call:
    """Where a pass waits, with the context and the modes that its thread has there.

    Parameters
    ----------
    name : str or None
        Of the module that comes next, None if there is no need to wait.
    run : callable
        Runs that module as it was when the pass came.
    args, kwargs
        What it is called with.
    go_on : callable
        Runs what has taken its place.
    """

    def __init__(
        self,
        name: str | None,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        go_on: Callable[[], Any],
    ) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs
        self._run, self._go_on = run, go_on
        self._context, self._modes = contextvars.copy_context(), _Modes.now()
        self._outcome: Any = None
        self._error: BaseException | None = None

    def try_out(self) -> None:
        """Run the module on a copy of its arguments, which it may write to, as caches are."""
        copied = functools.partial(duplicate, memo={})
        args = map(copied, self.args)
        kwargs = {key: copied(value) for key, value in self.kwargs.items()}
        with self._modes.entered():
            self._context.copy().run(self._run, *args, **kwargs)

    def finish(self) -> None:
        """Go on as far as the module goes."""
        try:
            with self._modes.entered():
                self._outcome = self._context.run(self._go_on)
        except BaseException as error:  # for the network's own code to see
            self._error = error

    def result(self) -> Any:
        """Return what the module has returned, or raise what it has raised (in the thread)."""
        for variable, value in self._context.items():  # which later code may read
            if variable.get(self) is not value:
                variable.set(value)
        if self._error is not None:
            raise self._error
        return self._outcome


@dataclasses.dataclass(frozen=True)
class _Modes:
    """Modes of torch that each thread has for itself."""

    gradients: bool
    inference: bool
    precisions: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def now(cls) -> _Modes:
        """Return those of this thread."""
        precisions = tuple(
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        )
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), precisions)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have these modes in this thread."""
        with contextlib.ExitStack() as modes:
            modes.enter_context(torch.inference_mode(self.inference))
            modes.enter_context(torch.set_grad_enabled(self.gradients))
            for device, dtype, enabled in self.precisions:
                if enabled or torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


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
        with _visiting(views, visitor), drawing(self._draws), torch.no_grad():
            try:
                forward(self._model, self.batch)
            finally:
                self._traces.restore()


@contextlib.contextmanager
def _visiting(views: dict[str, Matricized], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` with the name and the input of each layer that is called, until it raises.

    What it raises ends the run and comes out of it, but for :class:`Stopped`, whatever handlers of
    exceptions in the network make of that.
    """
    raised: list[BaseException] = []

    def hook(name: str) -> Callable[..., None]:
        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not raised:
                try:
                    visitor(name, layer_input(args, kwargs))
                except BaseException as error:
                    raised.append(error)
            if raised:
                raise Stopped

        return enter

    with contextlib.ExitStack() as handles:
        for name, view in views.items():
            handle = view.layer.register_forward_pre_hook(hook(name), with_kwargs=True)
            handles.callback(handle.remove)
        try:
            yield
        except (Exception, Stopped):
            if not raised:
                raise
    error = raised.pop() if raised else Stopped()  # else its frames would keep tensors in memory
    if not isinstance(error, Stopped):
        raise error


@contextlib.contextmanager
def waiting_before(model: nn.Module, name: str) -> Iterator[threading.Event]:
    """Make passes wait before the module `name`, and hand it on once the event yielded is set."""
    opened = threading.Event()
    module: Any = model.get_submodule(name)
    own, patched = type(module).forward, vars(module).get("forward")  # by another library before

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        return patched(*args, **kwargs) if patched else own(module, *args, **kwargs)

    reference = weakref.ref(module)  # what has been replaced need not stay in memory

    def forward_in_turn(*args: Any, **kwargs: Any) -> Any:
        before: Any = reference()

        def go_on() -> Any:
            now = model.get_submodule(name)
            # Without the hooks of a replacement: they are those of the layer that is being called.
            return run(before, *args, **kwargs) if now is before else now.forward(*args, **kwargs)

        comer = Pass.advancing()
        if comer is None:
            return go_on()
        at = None if opened.is_set() else name
        return comer.wait_for(_Call(at, functools.partial(run, before), args, kwargs, go_on))

    with contextlib.suppress(TypeError, ValueError):  # of compiled code
        signature = inspect.signature(module.forward)
        forward_in_turn.__signature__ = signature  # type: ignore[attr-defined]
    forward_in_turn.takes_turns = True  # type: ignore[attr-defined]
    module.forward = forward_in_turn
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
