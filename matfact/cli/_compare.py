"""``matfact compare``."""

# Numerical libraries are imported late, so that help is fast.
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matfact._text import printable
from matfact.cli._common import NO_GAIN, Scheduler, parse, show, told_to_users

if TYPE_CHECKING:
    from rich.console import Console

    from matfact.compare import Comparison


def compare(
    weights: Annotated[
        Path | None,
        typer.Argument(
            help="A .safetensors, .gguf (needs the extra gguf), .npz or .npy file, or a torch "
            "state dict (.pt, .pth, .bin; nothing is unpickled); or a folder with "
            "model.safetensors. Default: a trained transformer if the extra demo is installed, "
            "else a small network trained on the fly.",
        ),
    ] = None,
    density: Annotated[
        str, typer.Option(help="Stored values ÷ entries, or several separated by commas.")
    ] = "0.25",
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits a weight, or several separated by commas. Every method then gets "
            "the same bytes and chooses its density; --density is not used."
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Sides of the square windows. Default: 64,128,256,384."),
    ] = None,
    per_size: Annotated[int, typer.Option(min=1, help="Number of matrices per size.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Also use whole matrices.")] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Regular expression for layer names. Default: attention matrices."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated names; any unknown name lists all. Default: all."),
    ] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for comparison.csv, .json, .html, .png.")
    ] = Path("matfact-comparison"),
    jobs: Annotated[
        int,
        typer.Option(help="Number of parallel fits; -1: one per core, or per worker thread."),
    ] = -1,
    scheduler: Scheduler = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the windows and the methods.")
    ] = 0,
) -> None:
    """Compare all methods on real weight matrices, like Boža & Macko 2025, Fig. 3.

    Exit status:
    0 the study is complete (failed fits are listed)
    1 an internal error of matfact, which is shown
    2 the options, the weights or the output folder are invalid, or memory ran out
    3 the study is complete, but no fit succeeded
    130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP; every file is complete or unchanged
    """
    with told_to_users():
        comparison = _study(
            weights,
            cut={"sizes": parse("sizes", sizes, int), "per_size": per_size, "full": full,
                 "layers": layers, "random_state": seed},
            run={"methods": parse("methods", methods, str), "n_jobs": jobs,
                 "densities": parse("density", density, float), "bits": parse("bits", bits, float),
                 "random_state": seed},
            output=output,
            scheduler=scheduler,
        )  # fmt: skip
    if all(row.status != "ok" for row in comparison):
        raise typer.Exit(NO_GAIN)


def _study(
    weights: Path | None,
    cut: dict[str, Any],
    run: dict[str, Any],
    output: Path,
    scheduler: str | None,
) -> Comparison:
    """Load weights, run the study, show and write the results."""
    from rich.console import Console

    from matfact._files import check_output
    from matfact._parallel import on_cluster
    from matfact.compare import compare_projections, cut_matrices, load_weights, summary_table
    from matfact.compare._study import checked_methods

    checked_methods(run["methods"], run["densities"], run["bits"])  # before weights are read
    console = Console()
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that none is lost
    for ending in ("csv", "json", "html", "png"):
        check_output(output / f"comparison.{ending}", [] if weights is None else [weights])
    loaded = load_weights(weights, stored=scheduler is not None)
    matrices = cut_matrices(loaded, **cut)
    console.print(f"{len(matrices)} matrices from {printable(loaded.source)}", markup=False)
    _tell_left_out(console, matrices.left_out)
    with on_cluster(scheduler):
        comparison = compare_projections(matrices, **run, progress=True)
    comparison.metadata |= {"weights": loaded.source, "cut": cut}
    show(console, summary_table(comparison))
    failed = Counter((r.method, r.size, r.message) for r in comparison if r.status != "ok")
    for (method, size, message), count in failed.items():
        text = f"Failed: {method} at size {size} ({count}×): {printable(message)}"
        console.print(text, markup=False)
    _write(console, comparison, output)
    return comparison


def _tell_left_out(console: Console, left_out: Mapping[str, str]) -> None:
    """Print the layers that are not compared, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(
            f"Not compared ({len(names)}; {reason}): {printable(', '.join(names))}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _write(console: Console, comparison: Comparison, folder: Path) -> None:
    """Write tables, page and figure, each atomically."""
    from matfact.compare import plot_comparison, save_figure

    comparison.to_csv(folder / "comparison.csv")
    comparison.to_json(folder / "comparison.json")
    comparison.to_html(folder / "comparison.html")
    written = ["comparison.csv", "comparison.json", "comparison.html"]
    try:
        save_figure(plot_comparison(comparison), folder / "comparison.png")
        written.append("comparison.png")
    except ImportError as error:
        console.print(f"No figure: {error}", markup=False)
    console.print(f"Written to {folder}: {', '.join(written)}", markup=False)
