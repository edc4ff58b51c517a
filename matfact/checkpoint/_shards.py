"""Writing the files of a checkpoint, and checking them."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from matfact._files import replacing
from matfact._safetensors import TensorSpec, in_aligned_order, map_pages, serialize
from matfact.checkpoint._manifest import Shard, StoredTensor

#: Bytes mapped into memory at a time.
_WINDOW = 1 << 28


def shard_name(index: int) -> str:
    """Return the name of the file with number `index`."""
    return f"{index:05d}.safetensors"


def write_shard(path: Path, content: Iterable[bytes], tensors: Iterable[StoredTensor]) -> Shard:
    """Write a file atomically, and return its entry in the manifest."""
    digest, nbytes = hashlib.sha256(), 0
    with replacing(path) as file:
        for chunk in content:
            digest.update(chunk)
            nbytes += file.write(chunk)
    return Shard(path.name, nbytes, digest.hexdigest(), tuple(tensors))


def write_plain(
    path: Path,
    tensors: Mapping[str, tuple[TensorSpec, Iterable[bytes]]],
    notes: Mapping[str, str] | None = None,
) -> Shard:
    """Write tensors as they are, piece by piece."""
    specs = in_aligned_order({name: spec for name, (spec, _) in tensors.items()})
    content = (chunk for name in specs for chunk in tensors[name][1])
    held = [
        StoredTensor(name, spec, note=(notes or {}).get(name, "")) for name, spec in specs.items()
    ]
    return write_shard(path, serialize(specs, content, {}), held)


def check_shard(folder: Path, shard: Shard) -> None:
    """Raise ``ValueError`` unless the file is there with the bytes it was written with."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        raise _missing(path, shard)
    _check_digest(path, shard, file_digest(path))


def checked_pages(folder: Path, shard: Shard) -> np.ndarray:
    """Return the bytes of the file, mapped into memory once for the check and for all reading.

    Raises
    ------
    ValueError
        If the file is not there with the bytes it was written with.
    """
    path = folder / shard.file
    if not path.is_file() or (pages := map_pages(path)).size != shard.nbytes:
        raise _missing(path, shard)
    _check_digest(path, shard, hashlib.sha256(pages.data).hexdigest())
    return pages


def _missing(path: Path, shard: Shard) -> ValueError:
    return ValueError(f"{path} must be a file of {shard.nbytes} bytes; it is missing or cut.")


def _check_digest(path: Path, shard: Shard, digest: str) -> None:
    if digest != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the one in the manifest.")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Its bytes are hashed in few calls, which other Python threads hold up as seldom.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, _WINDOW):
            length = min(_WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ) as window:
                digest.update(window)
    return digest.hexdigest()
