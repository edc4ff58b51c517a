"""Exit statuses, one-line errors and comma-separated lists, for all commands."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from matfact._text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from matfact._tables import FittedTable

#: Option of commands that can run on a cluster.
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Address of a Dask scheduler, such as tcp://scheduler:8786, to run on its workers. "
        "They must see the files under the same paths."
    ),
]

T = TypeVar("T")

# Exit statuses: Python exits with 1 after a crash, and shells add 128 to a signal's number.
USAGE, NO_GAIN, SIGNALLED = 2, 3, 128


@contextlib.contextmanager
def told_to_users() -> Iterator[None]:
    """Turn errors that users can fix, and interruptions, into one line and an exit status."""
    try:
        with _stopped_like_ctrl_c():
            yield
    except BrokenPipeError:
        raise  # the reader, such as `head`, has closed the output: typer exits silently
    except (ValueError, ImportError, OSError) as error:
        raise _ended(f"Error: {printable(error)}", USAGE) from error
    except MemoryError as error:
        raise _ended(f"Error: out of memory. {error}".rstrip(), USAGE) from error
    except BrokenExecutor as error:
        message = "Error: a worker process was killed, perhaps out of memory. Try fewer jobs."
        raise _ended(message, USAGE) from error
    except KeyboardInterrupt as error:
        status = SIGNALLED + getattr(error, "number", signal.SIGINT)
        raise _ended("Stopped; every file is complete or as it was.", status) from error


def _ended(message: str, status: int) -> typer.Exit:
    with contextlib.suppress(OSError):  # the terminal may be closed
        typer.echo(message, err=True)
    return typer.Exit(status)


class _SignalInterrupt(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """Make SIGTERM and SIGHUP stop the work once, like Ctrl-C, unless they are ignored."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleanup
        raise _SignalInterrupt(number)

    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def show(console: Console, table: FittedTable) -> None:
    """Print a table, in a file or pipe with all its columns."""
    console.print(table, width=None if console.is_terminal else 10_000, crop=False)


def parse(option: str, text: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """Parse a comma-separated list; None stays None."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} must be {what} separated by commas, got {text!r}.") from error
