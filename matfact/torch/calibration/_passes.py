"""Passes of batches through a network, which can wait before a module and replay it."""

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
    """Ends a trial run. Not an ``Exception``, so that models do not catch it."""


class _Cancelled(BaseException):
    """Ends a pass that is no longer needed."""


class Pass:
    """Pass of one batch through the network, in a thread that can wait before modules.

    The network runs its own code with its own arguments, so any network is supported; the thread
    holds the position in that code. Modules are run by the thread that advances the pass, in the
    grad and autocast modes of the pass, so waiting threads hold no workers and no work space.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : object
        Input of the network.
    draws : RandomState
        Initial state of the random number generators. Passes to compare share it.

    Attributes
    ----------
    at : str or None
        Name of the module before which it waits.
    offloaded : set of mmap.mmap
        Files with tensors of the pass, while it needs them.
    """

    _local = threading.local()

    def __init__(self, model: nn.Module, batch: Any, draws: RandomState) -> None:
        self._draws = draws
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
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
        """Return the pass of the current thread."""
        present: Pass | None = getattr(cls._local, "current", None)
        return present

    def _run(self, model: nn.Module) -> None:
        self._local.current = self
        try:
            with self._modes.entered():  # modes are per thread
                forward(model, self.batch)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()

    def wait_for(self, call: _Call) -> Any:
        """Wait to be advanced, then continue and return the result (called in the thread)."""
        if not self._cancelled:  # else this is cleanup code, and nobody waits
            self._call = call
            page_out(self.offloaded)
            self._stopped.release()
            self._go.acquire()
            self._call = None
        if self._cancelled:
            raise _Cancelled
        return call.result()

    def advance(self) -> None:
        """Run the batch to its next stop or its end, and raise its error, if any."""
        with drawing(self._draws):
            if self._thread.ident is None:
                self._thread.start()
                self._stopped.acquire()
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
        self._stopped.acquire()

    def visit(self, views: dict[str, Matricized], visitor: Visitor) -> None:
        """Replay the module before which the batch waits, on a copy of the batch.

        Parameters
        ----------
        views : dict of str to Matricized
            Layers in that module, or the module itself.
        visitor : callable
            Called for each layer that is reached; may raise `Stopped`.
        """
        assert self._call is not None
        if (name := self._call.name) in views:
            with contextlib.suppress(Stopped):
                visitor(name, layer_input(self._call.args, self._call.kwargs))
        else:
            # Errors of the module are left to the network's own code, when the pass continues.
            ignoring = contextlib.suppress(Exception)
            with _visiting(views, visitor), drawing(self._draws), ignoring:
                self._call.try_out()
        page_out(self.offloaded)

    def output(self, *, gradients: bool = False) -> Any:
        """Return the output of the module before which the batch waits, as that module is now."""
        assert self._call is not None
        try:
            with drawing(self._draws):
                return self._call.output(gradients)
        finally:
            page_out(self.offloaded)

    def cancel(self) -> None:
        """End the thread at its current stop."""
        self._cancelled = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()


class _Call:
    """Position at which a pass waits, with the context and modes of its thread.

    Parameters
    ----------
    name : str or None
        Name of the next module, None if there is no need to wait.
    run : callable
        Runs that module as it was when the pass arrived.
    args, kwargs
        Arguments of the call.
    go_on : callable
        Runs that module as it is now, or its replacement.
    """

    def __init__(
        self,
        name: str | None,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        go_on: Callable[..., Any],
    ) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs
        self._run, self._go_on = run, go_on
        self._context, self._modes = contextvars.copy_context(), _Modes.now()
        self._outcome: Any = None
        self._error: BaseException | None = None

    def try_out(self) -> None:
        """Run the module on a copy of its arguments, since it may modify them (caches)."""
        args, kwargs = self._copied()
        with self._modes.entered():
            self._context.copy().run(self._run, *args, **kwargs)

    def output(self, gradients: bool) -> Any:
        """Return the output of the module as it is now, for a copy of its arguments."""
        args, kwargs = self._copied()
        with self._modes.entered(), torch.set_grad_enabled(gradients):
            return self._context.copy().run(self._go_on, *args, **kwargs)

    def _copied(self) -> tuple[Any, dict[str, Any]]:
        copied = functools.partial(duplicate, memo={})
        args = [copied(value) for value in self.args]
        return args, {key: copied(value) for key, value in self.kwargs.items()}

    def finish(self) -> None:
        """Run to the end of the module."""
        try:
            with self._modes.entered():
                self._outcome = self._context.run(self._go_on, *self.args, **self.kwargs)
        except BaseException as error:  # passed on to the network's own code
            self._error = error

    def result(self) -> Any:
        """Return the module's result or raise its error (in the thread)."""
        for variable, value in self._context.items():  # later code may read them
            if variable.get(self) is not value:
                variable.set(value)
        if self._error is not None:
            raise self._error
        return self._outcome


@dataclasses.dataclass(frozen=True)
class _Modes:
    """Thread-local modes of torch."""

    gradients: bool
    inference: bool
    precisions: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def now(cls) -> _Modes:
        """Return the modes of this thread."""
        precisions = tuple(
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        )
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), precisions)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Set these modes in this thread."""
        with contextlib.ExitStack() as modes:
            modes.enter_context(torch.inference_mode(self.inference))
            modes.enter_context(torch.set_grad_enabled(self.gradients))
            for device, dtype, enabled in self.precisions:
                if enabled or torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


class WholePass:
    """Pass of one batch through the whole network, repeatable and without stops.

    Parameters
    ----------
    model, batch, draws
        As in `Pass`.
    traces : Traces
        State that passes may leave in the network; restored after each.
    """

    at = None

    def __init__(self, model: nn.Module, batch: Any, draws: RandomState, traces: Traces) -> None:
        self._model, self._draws, self._traces = model, draws, traces
        self.batch = batch

    def visit(self, views: dict[str, Matricized], visitor: Visitor) -> None:
        """Run the batch through the network, like `Pass.visit` through a module."""
        with _visiting(views, visitor), drawing(self._draws), torch.no_grad():
            try:
                forward(self._model, self.batch)
            finally:
                self._traces.restore()


@contextlib.contextmanager
def _visiting(views: dict[str, Matricized], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` with the name and input of each called layer, until it raises.

    Its exception ends the run and is raised, except `Stopped`, even if the network handles
    exceptions.
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
    error = raised.pop() if raised else Stopped()  # popped, as its frames keep tensors in memory
    if not isinstance(error, Stopped):
        raise error


@contextlib.contextmanager
def waiting_before(model: nn.Module, name: str) -> Iterator[threading.Event]:
    """Make passes wait before the module `name`, until the yielded event is set."""
    opened = threading.Event()
    module: Any = model.get_submodule(name)
    own, patched = type(module).forward, vars(module).get("forward")  # patched by another library

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        return patched(*args, **kwargs) if patched else own(module, *args, **kwargs)

    reference = weakref.ref(module)  # does not keep replaced modules in memory

    def forward_in_turn(*args: Any, **kwargs: Any) -> Any:
        before: Any = reference()

        def go_on(*args: Any, **kwargs: Any) -> Any:
            now = model.get_submodule(name)
            # Without the hooks of a replacement: those of the current call already run.
            return run(before, *args, **kwargs) if now is before else now.forward(*args, **kwargs)

        comer = Pass.advancing()
        if comer is None:
            return go_on(*args, **kwargs)
        at = None if opened.is_set() else name
        return comer.wait_for(_Call(at, functools.partial(run, before), args, kwargs, go_on))

    with contextlib.suppress(TypeError, ValueError):  # compiled code has no signature
        signature = inspect.signature(module.forward)
        forward_in_turn.__signature__ = signature  # type: ignore[attr-defined]
    forward_in_turn.takes_turns = True  # type: ignore[attr-defined]
    module.forward = forward_in_turn
    # With a hook, torch's attention calls its modules instead of reading their weights.
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
