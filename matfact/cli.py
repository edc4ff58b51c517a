"""The command line: ``matfact compare``."""

# Only typer is imported here: the rest waits until a command runs, so that help is immediate.
from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import matfact

if TYPE_CHECKING:
    from rich.console import Console

    from matfact.compare import Comparison, ComparisonRow

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
T = TypeVar("T")

_FAILURE, _USAGE, _INTERRUPTED = 1, 2, 130  # exit statuses; the last is the one shells give Ctrl-C


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"matfact {matfact.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and leave."
        ),
    ] = False,
) -> None:
    """Factorize weight matrices into products of sparse and structured factors."""


@app.command()
def compare(
    weights: Annotated[
        Path | None,
        typer.Argument(
            help="A .safetensors, .npz or .npy file, or a torch state dict (.pt, .pth, .bin; "
            "nothing is unpickled). Without it: a trained transformer where matfact\\[demo] is "
            "installed, or a small network trained on the spot.",
        ),
    ] = None,
    density: Annotated[
        str, typer.Option(help="Stored values ÷ entries, or several separated by commas.")
    ] = "0.25",
    sizes: Annotated[
        str | None,
        typer.Option(help="Sides of the square windows, as 64,128,256,384 (the default)."),
    ] = None,
    per_size: Annotated[int, typer.Option(min=1, help="Matrices of each size.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Also take whole matrices.")] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Regular expression for layer names; by default attention matrices."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names separated by commas; an unknown one lists them. Default: all."),
    ] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for comparison.csv, .json and .png.")
    ] = Path("matfact-comparison"),
    jobs: Annotated[int, typer.Option(help="Fits run at a time; -1: one on each core.")] = -1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows and seeds the methods.")
    ] = 0,
) -> None:
    """Compare all methods on real weight matrices, in the manner of paper 001, Fig. 3.

    Exit status:
    0 the study is complete (fits that failed are listed)
    1 no fit succeeded
    2 the options, the weights or the output folder cannot be used
    130 stopped by Ctrl-C; every file is complete or as it was
    """
    with _told_to_users():
        comparison = _study(
            weights,
            cut={"sizes": _parse("sizes", sizes, int), "per_size": per_size, "full": full,
                 "layers": layers, "random_state": seed},
            run={"methods": _parse("methods", methods, str), "n_jobs": jobs,
                 "densities": _parse("density", density, float), "random_state": seed},
            output=output,
        )  # fmt: skip
    if all(row.status != "ok" for row in comparison):
        raise typer.Exit(_FAILURE)


@contextlib.contextmanager
def _told_to_users() -> Iterator[None]:
    """Turn what a user can put right, or did, into one line and an exit status."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(_USAGE) from error
    except KeyboardInterrupt as error:
        typer.echo("Stopped; every file is complete or as it was.", err=True)
        raise typer.Exit(_INTERRUPTED) from error


def _parse(option: str, text: str | None, kind: Callable[[str], T]) -> list[T] | None:
    """Return the values of a list separated by commas, or None for no list."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} must be {what} separated by commas, got {text!r}.") from error


def _study(
    weights: Path | None, cut: dict[str, Any], run: dict[str, Any], output: Path
) -> Comparison:
    """Load, cut, compare, show and write."""
    from rich.console import Console

    from matfact.compare import cut_matrices, load_weights, summary_table

    console = Console()
    output.mkdir(parents=True, exist_ok=True)  # before the work, lest that be lost
    loaded = load_weights(weights)
    matrices = cut_matrices(loaded, **cut)
    console.print(f"{len(matrices)} matrices from {loaded.source}", markup=False)
    comparison = _compare(console, matrices, run)
    comparison.metadata |= {"weights": loaded.source, "cut": cut}
    console.print(summary_table(comparison))
    failed = Counter((r.method, r.size, r.message) for r in comparison if r.status != "ok")
    for (method, size, message), count in failed.items():
        console.print(f"Failed: {method} at size {size} ({count}×): {message}", markup=False)
    _write(console, comparison, output)
    return comparison


def _compare(
    console: Console, matrices: Mapping[str, Any], options: Mapping[str, Any]
) -> Comparison:
    """Run the study behind a progress display."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from matfact.compare import compare_projections

    columns = (BarColumn(), MofNCompleteColumn(), Elapsed(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=None)

        def advance(row: ComparisonRow, total: int) -> None:
            what = "failed" if row.normalized_error is None else f"{row.normalized_error:.3f}"
            description = f"{row.method} {row.size}: {what}"
            progress.update(bar, advance=1, total=total, description=description)

        return compare_projections(matrices, **options, progress=advance)


def _write(console: Console, comparison: Comparison, folder: Path) -> None:
    """Write table and figure, each whole or not at all."""
    from matfact.compare import plot_comparison, save_figure

    comparison.to_csv(folder / "comparison.csv")
    comparison.to_json(folder / "comparison.json")
    written = ["comparison.csv", "comparison.json"]
    try:
        save_figure(plot_comparison(comparison), folder / "comparison.png")
        written.append("comparison.png")
    except ImportError as error:
        console.print(f"No figure: {error}", markup=False)
    console.print(f"Written to {folder}: {', '.join(written)}", markup=False)
