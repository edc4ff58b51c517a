"""Writing the files of a checkpoint, and checking them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from matfact._files import replacing
from matfact._safetensors import TensorSpec, in_aligned_order, serialize
from matfact._safetensors_file import SafetensorsFile
from matfact.checkpoint._manifest import Shard, StoredTensor


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


def check_shard(folder: Path, shard: Shard, *, in_memory: bool = False) -> SafetensorsFile:
    """Return the file; what is read of it from now on are the bytes checked here.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    shard : Shard
        Its file.
    in_memory : bool, default=False
        Whether to read all of it at once.

    Raises
    ------
    ValueError
        If the file is not there with the bytes it was written with.
    """
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        raise ValueError(f"{path} must be a file of {shard.nbytes} bytes; it is missing or cut.")
    file = SafetensorsFile(path, in_memory=in_memory)
    if file.sha256 != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the one in the manifest.")
    return file
