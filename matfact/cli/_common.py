"""What the commands share: exit statuses, errors in one line, lists separated by commas."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

import typer

from matfact._text import printable

#: An option of the commands whose work a cluster can do.
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Address of a Dask scheduler, as tcp://scheduler:8786, whose workers do the work. "
        "They must reach the files under the same names."
    ),
]

T = TypeVar("T")

# Exit statuses; the last is the one shells give Ctrl-C.
FAILURE, USAGE, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def told_to_users() -> Iterator[None]:
    """Turn what a user can put right, or did, into one line and an exit status."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads the output, as `head`, has seen enough: typer ends in silence
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"Error: {printable(error)}", err=True)
        raise typer.Exit(USAGE) from error
    except KeyboardInterrupt as error:
        typer.echo("Stopped; every file is complete or as it was.", err=True)
        raise typer.Exit(INTERRUPTED) from error


def parse(option: str, text: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """Return the values of a list separated by commas, or None for no list."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} must be {what} separated by commas, got {text!r}.") from error
