"""Writing and checking of the files of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from matfact._files import replacing
from matfact._safetensors import TensorSpec, in_aligned_order, serialize
from matfact._safetensors_file import SafetensorsFile
from matfact.checkpoint._manifest import Shard, StoredTensor


def shard_name(index: int) -> str:
    """Return the name of file number `index`."""
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
    """Write unchanged tensors, in pieces."""
    specs = in_aligned_order({name: spec for name, (spec, _) in tensors.items()})
    content = (chunk for name in specs for chunk in tensors[name][1])
    held = [
        StoredTensor(name, spec, note=(notes or {}).get(name, "")) for name, spec in specs.items()
    ]
    return write_shard(path, serialize(specs, content, {}), held)


def check_shard(folder: Path, shard: Shard, *, in_memory: bool = False) -> SafetensorsFile:
    """Verify and open a file; later reads are guaranteed to return the verified bytes.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    shard : Shard
        Its file.
    in_memory : bool, default=False
        Whether to read the whole file at once.

    Raises
    ------
    ValueError
        If the file is missing or has changed.
    """
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        raise ValueError(f"{path} must be a file of {shard.nbytes} bytes; it is missing or cut.")
    file = SafetensorsFile(path, in_memory=in_memory)
    if file.sha256 != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the one in the manifest.")
    return file
