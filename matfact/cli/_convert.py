"""``matfact convert``."""

# Numerical libraries are imported late, so that help is fast.
from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from matfact.cli._checkpoint import print_totals, with_progress
from matfact.cli._common import NO_GAIN, told_to_users


class Layout(enum.StrEnum):
    """How weights are stored."""

    SPARSE = "sparse"
    DENSE = "dense"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, a .safetensors.index.json, or a folder with either: dense "
            "weights with zeros, or the formats sparse-bitmask and sparse-24-bitmask of "
            "compressed-tensors. Or a .gguf file; to dense, also a checkpoint."
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            help="To sparse: a new folder for the checkpoint, or one with work to resume. To "
            "dense: a new folder, which also gets configuration and tokenizer, or the name of a "
            ".safetensors file."
        ),
    ],
    to: Annotated[Layout, typer.Option(help="How the weights are to be stored.")] = Layout.SPARSE,
    negative_zeros: Annotated[
        bool,
        typer.Option(
            help="Whether to store negative zeros like other values. Weights multiplied by a mask "
            "have many; without them, they come back as positive zeros."
        ),
    ] = True,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Number of parallel jobs; -1: one per core. Default: 1.", show_default=False
        ),
    ] = None,
) -> None:
    """Store sparse weights as sparse factors, or as dense weights, bit by bit the same.

    If the conversion to a checkpoint is stopped or killed, the same command resumes it.

    Exit status:
    0 the output is complete (kept layers are listed with the reason)
    1 an internal error of matfact, which is shown
    2 the weights or the output are invalid, or memory ran out
    3 the checkpoint is complete, but no layer has enough zeros
    130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP; the same command resumes
    """
    with told_to_users():
        from matfact.checkpoint import convert as store
        from matfact.checkpoint import to_dense

        if to is Layout.DENSE:
            to_dense(source, output)
            typer.echo(f"Written to {output}")
            return
        checkpoint = with_progress(
            lambda progress: store(
                source, output, negative_zeros=negative_zeros, n_jobs=jobs, progress=progress
            )
        )
        print_totals(checkpoint)
    if not any(tensor.is_product for tensor in checkpoint.tensors.values()):
        raise typer.Exit(NO_GAIN)
