"""Conversion of sparse or quantized weights, in any format that is read, to dense ones."""

from __future__ import annotations

import json
from pathlib import Path

from matfact._files import (
    check_output,
    output_folder,
    replacing,
    replacing_folder,
    write_atomically,
)
from matfact._safetensors import SINGLE_FILE, in_aligned_order
from matfact.checkpoint._config import (
    CONFIG,
    check_config,
    copy_others,
    read_config,
    without_sparsity,
)
from matfact.checkpoint._decompress import DenseContent, check_space, decompress, dense_content
from matfact.checkpoint._manifest import MANIFEST
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._source import Source


def to_dense(source: str | Path, output: str | Path) -> None:
    """Write the weights of a network as dense tensors, atomically.

    The values of sparse weights are copied bit by bit.

    Parameters
    ----------
    source : str or Path
        A checkpoint, or anything that `convert` reads.
    output : str or Path
        A name that ends in ``.safetensors`` for a file; an existing one stays intact until the new
        one is complete. Otherwise a new or empty folder: it gets ``model.safetensors`` and, if
        `source` is a folder too, its ``config.json`` without the sparse format, and the small files
        beside the weights, such as those of the tokenizer.

    Raises
    ------
    FileNotFoundError
        If there are no weights at `source`.
    ImportError
        If a GGUF file is given and gguf is not installed.
    ValueError
        If the source is damaged or holds quantized weights other than GGUF, the disk has too little
        space, or `output` is not allowed.
    """
    source, output = Path(source), Path(output)
    is_checkpoint = (source / MANIFEST).is_file()
    config = read_config(source)
    if not is_checkpoint:
        check_config(source)
    if output.suffix == ".safetensors" and is_checkpoint:
        return decompress(source, output)
    if is_checkpoint:
        content = dense_content(Checkpoint(source))
    else:
        weights = Source(source)
        weights.digests()  # so that everything read is checked
        content = DenseContent(
            in_aligned_order(weights.specs),
            lambda name: weights.location(name).chunks(),
            weights.metadata,
        )
    if output.suffix == ".safetensors":
        check_output(output, weights.files)
        check_space(content, output)
        return write_atomically(output, content.serialized())
    target = output_folder(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(content, target)
    with replacing_folder(target) as folder:
        copy_others(source, folder)
        if config is not None:
            with replacing(folder / CONFIG) as file:
                file.write(json.dumps(without_sparsity(config), indent=2).encode())
        with replacing(folder / SINGLE_FILE) as file:
            file.writelines(content.serialized())
    return None
