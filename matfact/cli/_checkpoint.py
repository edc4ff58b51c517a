"""``matfact compress``, ``matfact inspect`` and ``matfact decompress``."""

# Numerical libraries are imported late, so that help is fast.
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matfact._text import printable
from matfact.cli._common import NO_GAIN, Scheduler, told_to_users

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from matfact.checkpoint import Checkpoint, Shard
    from matfact.factorizers import BaseFactorizer


def compress(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, a .safetensors.index.json, or a folder with "
            "model.safetensors or else its index; 'demo' is the trained transformer of "
            "matfact\\[demo]."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New folder, or one with work to resume.")],
    method: Annotated[
        str, typer.Option(help="Factorization method; any unknown name lists all.")
    ] = "dsf",
    density: Annotated[float, typer.Option(help="Stored values ÷ entries of each layer.")] = 0.5,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Regular expression to search in the names of weights. By default the weights "
            "of all linear layers and 1-D, 2-D and 3-D convolutions. Other tensors are copied, "
            "and the reason is shown."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Number of parallel jobs; -1: one per core. Default: 1, or all of a cluster.",
            show_default=False,
        ),
    ] = None,
    scheduler: Scheduler = None,
) -> None:
    """Factorize the layers in a safetensors file, one at a time, and copy all other tensors.

    If it is stopped or killed, the same command resumes the work. A folder with config.json
    becomes one that from_pretrained reads after "import matfact.transformers".

    Exit status:
    0 the checkpoint is complete (kept layers are listed with the reason)
    1 an internal error of matfact, which is shown
    2 the options, the weights or the output folder are invalid, or memory ran out
    3 the checkpoint is complete, but no layer could be factorized
    130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP; the same command resumes
    """
    with told_to_users():
        from matfact._parallel import on_cluster

        with on_cluster(scheduler):
            weights, factorizer = _weights(source), _factorizer(method, density)
            checkpoint = _compressed(weights, output, factorizer, layers, jobs)
        _print_totals(checkpoint)
    if not any(tensor.is_product for tensor in checkpoint.tensors.values()):
        raise typer.Exit(NO_GAIN)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page to this file.")] = None,
) -> None:
    """Verify a checkpoint and show its contents.

    Exit status:
    0 the checkpoint is intact
    1 an internal error of matfact, which is shown
    2 it is damaged or missing, or the page cannot be written
    """
    with told_to_users():
        from matfact._files import check_output, write_atomically
        from matfact.checkpoint import Checkpoint
        from matfact.checkpoint._html import page

        checkpoint = Checkpoint(folder)
        if html is not None:
            check_output(html, checkpoint.files)
        checkpoint.verify()
        if html is not None:
            write_atomically(html, page(checkpoint).encode())
        if as_json:
            typer.echo(json.dumps(_summary(checkpoint), indent=1))
            return
        from rich.console import Console

        Console().print(_table(checkpoint))
        _print_totals(checkpoint)


def decompress(
    folder: Annotated[Path, typer.Argument(help="A checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Convert a checkpoint to a safetensors file of dense tensors.

    Exit status:
    0 the file is written
    1 an internal error of matfact, which is shown; nothing is written
    2 the checkpoint is damaged, the file cannot be written, or memory ran out; nothing is
    130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP; nothing is written
    """
    with told_to_users():
        from matfact.checkpoint import decompress as write_dense

        write_dense(folder, output)
        typer.echo(f"Written to {output}")


def _weights(source: Path) -> Path:
    """Return the path of the weights: `source`, or that of the demo."""
    if str(source) != "demo" or source.exists():
        return source
    from matfact.compare._weights import demo_folder

    folder = demo_folder()
    if folder is None:
        raise ValueError("source must exist; 'demo' needs pip install 'matfact[demo]'.")
    return folder


def _factorizer(method: str, density: float) -> BaseFactorizer:
    from sklearn.base import clone

    from matfact.compare import METHODS
    from matfact.metrics import check_density

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    check_density(density)
    return clone(METHODS[method].estimator).set_params(density=density)


def _compressed(
    source: Path, output: Path, factorizer: BaseFactorizer, layers: str | None, jobs: int | None
) -> Checkpoint:
    """Compress with a progress display, and list the tensors kept."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    from matfact.checkpoint import compress as run

    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), Elapsed(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=None)

        def advance(shard: Shard, total: int) -> None:
            for line in _kept(shard):
                _print(console, line)
            tensor = shard.tensors[-1]
            error = "copied" if tensor.relative_error is None else f"{tensor.relative_error:.3f}"
            description = f"{printable(tensor.name)}: {error}".replace("[", "\\[")
            progress.update(bar, advance=1, total=total, description=description)

        return run(source, output, factorizer, layers=layers, n_jobs=jobs, progress=advance)


def _kept(shard: Shard) -> Iterator[str]:
    """Yield a line per reason for keeping tensors."""
    from matfact.checkpoint._compress import ASKED

    names: dict[str, list[str]] = {}
    for tensor in shard.tensors:
        if tensor.note:
            names.setdefault(tensor.note, []).append(printable(tensor.name))
    for reason, held in names.items():
        shown = held if reason.startswith(ASKED) or len(held) < 5 else held[:3]
        more = f" and {len(held) - len(shown)} more" if len(held) > len(shown) else ""
        yield f"Kept {', '.join(shown)}{more}: {reason}"


def _print_totals(checkpoint: Checkpoint) -> None:
    factorized = sum(tensor.is_product for tensor in checkpoint.tensors.values())
    method = checkpoint.settings.get("method")
    by = f" by {printable(method)}" if isinstance(method, str) else ""
    typer.echo(
        f"{checkpoint.path}: {len(checkpoint)} tensors, {factorized} of them factorized{by}; "
        f"{checkpoint.nbytes:,} bytes of {checkpoint.dense_nbytes:,} "
        f"({checkpoint.nbytes / max(1, checkpoint.dense_nbytes):.1%})"
    )


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "settings": checkpoint.settings,
        "nbytes": checkpoint.nbytes,
        "dense_nbytes": checkpoint.dense_nbytes,
        "tensors": [
            tensor.to_json()
            | {
                "nbytes": checkpoint.tensor_nbytes(name),
                "bits_per_weight": checkpoint.bits_per_weight(name),
            }
            for name, tensor in checkpoint.tensors.items()
        ],
    }


def _table(checkpoint: Checkpoint) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for title in ("tensor", "shape", "dtype", "stored as"):
        table.add_column(title, overflow="fold")
    for title in ("density", "error", "bytes", "bits"):
        table.add_column(title, justify="right")
    for name, tensor in checkpoint.tensors.items():
        shape = "×".join(map(str, tensor.spec.shape))
        stored_as = " · ".join(tensor.storage) or tensor.note
        numbers = (tensor.density, tensor.relative_error)
        table.add_row(
            *(Text(printable(text)) for text in (name, shape, tensor.spec.dtype, stored_as)),
            *("" if number is None else f"{number:.4f}" for number in numbers),
            f"{checkpoint.tensor_nbytes(name):,}",
            f"{checkpoint.bits_per_weight(name):.2f}",
        )
    return table


def _print(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False)
