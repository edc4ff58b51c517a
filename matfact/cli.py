"""The command line: ``matfact compare``."""

# Only typer is imported here: the rest waits until a command runs, so that help is immediate.
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import matfact

if TYPE_CHECKING:
    from matfact.compare import Comparison, ComparisonRow

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
T = TypeVar("T")

#: Exit status of a study in which no fit succeeded or whose results cannot be written.
FAILURE = 1
#: Exit status for options or weights that cannot be used.
USAGE = 2
#: Exit status after Ctrl-C, as shells report it.
INTERRUPTED = 130


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

    Exit status: 0 when the study is complete (failed fits are listed), 1 when no fit succeeded
    or the results cannot be written, 2 for options or weights that cannot be used, 130 after
    Ctrl-C.
    """
    from rich.console import Console

    from matfact.compare import cut_matrices, load_weights, summary_table

    console = Console()
    try:
        densities = _values("density", density, float)
        sides = None if sizes is None else _values("sizes", sizes, int)
        names = None if methods is None else _values("methods", methods, str)
        output.mkdir(parents=True, exist_ok=True)  # before the work, lest it be lost
        loaded = load_weights(weights)
        matrices = cut_matrices(
            loaded, sizes=sides, per_size=per_size, layers=layers, full=full, random_state=seed
        )
        console.print(f"{len(matrices)} matrices from {loaded.source}", markup=False)
        comparison = _run(console, matrices, names, densities, jobs, seed)
    except (ValueError, ImportError, OSError) as error:
        raise _leave(f"Error: {error}", USAGE) from error
    except KeyboardInterrupt as error:
        raise _leave("Stopped; nothing was written.", INTERRUPTED) from error
    comparison.metadata["weights"] = loaded.source
    console.print(summary_table(comparison))
    for row in comparison:
        if row.status != "ok":
            console.print(f"Failed: {row.method} on {row.matrix}: {row.message}", markup=False)
    try:
        _write(console, comparison, output)
    except OSError as error:
        raise _leave(f"Error: the results cannot be written: {error}", FAILURE) from error
    if all(row.status != "ok" for row in comparison):
        raise typer.Exit(FAILURE)


def _values(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Return the values in a list separated by commas."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        what = {int: "integers", float: "numbers"}[kind]  # type: ignore[index]
        raise ValueError(f"{option} must be {what} separated by commas, got {text!r}.") from error


def _run(
    console: Any,
    matrices: Any,
    methods: Sequence[str] | None,
    densities: Sequence[float],
    jobs: int,
    seed: int,
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

        return compare_projections(
            matrices, methods, densities=densities, n_jobs=jobs, random_state=seed,
            progress=advance,
        )  # fmt: skip


def _write(console: Any, comparison: Comparison, folder: Path) -> None:
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


def _leave(message: str, status: int) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(status)
