"""The command line: ``matfact compare``, ``compress``, ``convert``, ``inspect``, ``decompress``."""

# Only typer is imported here; commands import the rest, so that help is fast.
from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import matfact
from matfact.cli._checkpoint import compress, decompress, inspect
from matfact.cli._compare import compare
from matfact.cli._convert import convert

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (compare, compress, convert, inspect, decompress):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"matfact {matfact.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Factorize weight matrices into products of sparse and structured factors."""
    # Names may hold characters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            stream.reconfigure(errors="backslashreplace")
