"""``matfact compress``, ``matfact inspect`` and ``matfact decompress``."""

# Numerical libraries are imported late, so that help is fast.
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matfact._text import extra, printable
from matfact.cli._common import NO_GAIN, Scheduler, show, told_to_users

if TYPE_CHECKING:
    from rich.console import Console

    from matfact._tables import FittedTable
    from matfact.checkpoint import Checkpoint
    from matfact.factorizers import BaseFactorizer

#: Density if nothing is asked for.
DENSITY = 0.5


def compress(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, a .safetensors.index.json, or a folder with "
            "model.safetensors or else its index; or a .gguf file (needs the extra gguf). 'demo' "
            "is the trained transformer of the extra demo."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New folder, or one with work to resume.")],
    method: Annotated[
        str, typer.Option(help="Factorization method; any unknown name lists all.")
    ] = "dsf",
    density: Annotated[
        float | None,
        typer.Option(
            help="Stored values ÷ entries of each layer. Default: 0.5.", show_default=False
        ),
    ] = None,
    value_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of each stored value, 2 to 8. Default: the source's floating point.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, positions included; the header of a layer's file, about a "
            "kilobyte, comes on top. The method then chooses its density and the bits of values "
            "for each layer.",
            show_default=False,
        ),
    ] = None,
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
    """Factorize the layers in a file of weights, one at a time, and copy all other tensors.

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
        from matfact.checkpoint import compress as run

        with on_cluster(scheduler):
            factorizer = _factorizer(method, density, value_bits, bits)
            weights = _weights(source)
            checkpoint = with_progress(
                lambda progress: run(
                    weights, output, factorizer,
                    layers=layers, bits=bits, n_jobs=jobs, progress=progress,
                )
            )  # fmt: skip
        print_totals(checkpoint)
    if not any(tensor.is_product for tensor in checkpoint.tensors.values()):
        raise typer.Exit(NO_GAIN)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page to this file.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Also time factors and dense matrices here, for so many samples.", min=1),
    ] = None,
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

        if batch_size is not None:
            _check_times(as_json)
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

        show(console := Console(), _table(checkpoint))
        _print_kept(console, checkpoint)
        print_totals(checkpoint)
        if batch_size is not None:
            typer.echo(_speed(checkpoint, batch_size))


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
        raise ValueError(f"source must exist; 'demo' needs {extra('demo')}.")
    return folder


def _factorizer(
    method: str, density: float | None, value_bits: int | None, bits: float | None
) -> BaseFactorizer:
    from sklearn.base import clone

    from matfact.factorizers._at_bits import check_bits
    from matfact.factorizers._registry import COMPARED_BY_BITS
    from matfact.factorizers._settings import check_value_bits, configured

    if method not in COMPARED_BY_BITS:
        raise ValueError(f"method must be one of {', '.join(COMPARED_BY_BITS)}, got {method!r}.")
    estimator = clone(COMPARED_BY_BITS[method].estimator)
    if bits is None:
        check_value_bits(value_bits)
        if density is None and estimator.has_density:
            density = DENSITY
        return configured(estimator, density, value_bits)
    check_bits(bits)
    for name, given in (("density", density), ("value-bits", value_bits)):
        if given is not None:
            raise ValueError(f"--{name} must not be given with --bits, which chooses it.")
    return estimator


def with_progress(write: Callable[[bool], Checkpoint]) -> Checkpoint:
    """Write a checkpoint with a progress display, and list the tensors kept."""
    from rich.console import Console

    checkpoint = write(True)
    _print_kept(Console(), checkpoint)
    return checkpoint


def _print_kept(console: Console, checkpoint: Checkpoint) -> None:
    for line in _kept(checkpoint):
        console.print(printable(line), markup=False, highlight=False)


def _kept(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line per reason for keeping tensors."""
    from matfact.checkpoint._compress import ASKED

    names: dict[str, list[str]] = {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.note:
            names.setdefault(tensor.note, []).append(printable(name))
    for reason, held in names.items():
        shown = held if reason.startswith(ASKED) or len(held) < 5 else held[:3]
        more = f" and {len(held) - len(shown)} more" if len(held) > len(shown) else ""
        nbytes = sum(t.spec.nbytes for t in checkpoint.tensors.values() if t.note == reason)
        yield f"Kept {', '.join(shown)}{more}: {reason} ({nbytes:,} bytes)"


def print_totals(checkpoint: Checkpoint) -> None:
    """Print the size of a checkpoint and how many of its tensors have factors."""
    factorized = sum(tensor.is_product for tensor in checkpoint.tensors.values())
    method = checkpoint.settings.get("method")
    by = f" by {printable(method)}" if isinstance(method, str) else ""
    typer.echo(
        f"{checkpoint.path}: {len(checkpoint)} tensors, {factorized} of them factorized{by}; "
        f"{checkpoint.nbytes:,} bytes of {checkpoint.dense_nbytes:,} "
        f"({checkpoint.nbytes / max(1, checkpoint.dense_nbytes):.1%})"
    )


def _check_times(as_json: bool) -> None:
    """Raise an error, before any work, if products cannot be timed."""
    if as_json:
        raise ValueError("--batch-size must not be given with --json, which holds no times.")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--batch-size needs torch: {extra('torch')}.") from error


def _speed(checkpoint: Checkpoint, batch_size: int) -> str:
    """Return a sentence on the times of all products and of their dense matrices."""
    from matfact.torch.speed import measure_products

    names = [name for name, tensor in checkpoint.tensors.items() if tensor.is_product]
    if not names:
        return "No tensor is factorized, so there is nothing to time."
    speed = measure_products([checkpoint.product(name) for name in names], batch_size)
    return (
        f"{len(names)} products with {batch_size} sample{'s' * (batch_size > 1)}: "
        f"{1e3 * speed.seconds:.3g} ms here, {1e3 * speed.dense_seconds:.3g} ms if dense, "
        f"× {speed.speedup:.2f}. The rest of a network takes as long as before; "
        "matfact.torch.measure_speed runs all of it."
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


def _table(checkpoint: Checkpoint) -> FittedTable:
    from matfact._tables import FittedTable, Heading

    headings = [
        Heading("tensor", is_number=False),
        Heading("shape", 3, is_number=False),
        Heading("dtype", 5, is_number=False),
        Heading("stored as", 2, is_number=False),
        Heading("density", 6),
        Heading("error", 1),
        Heading("bytes"),
        Heading("bits", 4),
    ]
    rows = [
        [
            name,
            "×".join(map(str, tensor.spec.shape)),
            tensor.spec.dtype,
            " · ".join(tensor.storage),
            *("" if n is None else f"{n:.4f}" for n in (tensor.density, tensor.relative_error)),
            f"{checkpoint.tensor_nbytes(name):,}",
            f"{checkpoint.bits_per_weight(name):.2f}",
        ]
        for name, tensor in checkpoint.tensors.items()
        if not tensor.note  # told below the table, by reason
    ]
    return FittedTable(headings, [rows])
