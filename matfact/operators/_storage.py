"""Factors on disk: one safetensors file without pickles, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matfact._files import write_atomically
from matfact._json import is_version, parse_json
from matfact._safetensors import in_aligned_order, serialize
from matfact._safetensors_file import SafetensorsFile
from matfact.operators._encoding import decode, encode
from matfact.operators._factor import Factor

FORMAT = "matfact"
#: What is written; earlier versions are read.
FORMAT_VERSION = 2


def save(factors: Sequence[Factor], path: Path) -> None:
    """Write `factors` to `path` atomically: an existing file stays intact until then."""
    write_atomically(path, pack(factors)[1])


def pack(
    factors: Sequence[Factor], dtype: str | None = None
) -> tuple[tuple[str, ...], Iterator[bytes]]:
    """Return the storage format of each factor, and the bytes of a file with all of them.

    ``dtype="BF16"`` rounds real values to bfloat16; by default dtypes are kept.
    """
    entries, tensors = encode(factors, dtype)
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "factors": entries}
    specs = in_aligned_order({name: spec for name, (spec, _) in tensors.items()})
    content = (tensors[name][1] for name in specs)
    text = json.dumps(manifest, separators=(",", ":"))
    kinds = tuple(_storage_name(entry) for entry in entries)
    return kinds, serialize(specs, content, {FORMAT: text})


def _storage_name(entry: dict[str, Any]) -> str:
    """Return how a factor is stored, for readers of the manifest."""
    quantized = entry.get("quantized")
    return entry["kind"] if quantized is None else f"{entry['kind']}, {quantized['bits']} bits"


def load(file: SafetensorsFile) -> list[Factor]:
    """Read factors written by `save`; bfloat16 values become float32.

    Raises
    ------
    ValueError
        If the file is damaged or not a matfact file.
    """
    path, entries = file.path, factor_entries(file)
    try:
        factors = decode(entries, {name: file.read(name) for name in file.specs})
        _check_inner_sides(factors, file.nbytes)
        return factors
    except ValueError as error:
        raise ValueError(
            f"path must name an intact matfact file, but in {path} {error}."
        ) from error


def factor_entries(file: SafetensorsFile) -> list[dict[str, Any]]:
    """Return the description of each factor in a file, or raise ``ValueError``."""
    path = file.path
    try:
        manifest = parse_json(file.metadata.get(FORMAT, "{}").encode())
    except ValueError:
        manifest = {}
    if not is_version(manifest, FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"path must name a matfact file of version 1 to {FORMAT_VERSION}, got {path}."
        )
    entries = manifest.get("factors")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"path must name a complete matfact file, but {path} lists no factors.")
    return entries


def _check_inner_sides(factors: Sequence[Factor], nbytes: int) -> None:
    """Raise ``ValueError`` if a small file claims huge inner dimensions."""
    outer = max((factors[0].shape[0], factors[-1].shape[1]) if factors else (0, 0))
    for factor in factors[1:]:
        if factor.shape[0] > max(outer, 8 * nbytes):  # a position takes at least one bit
            raise ValueError(
                f"an inner side is {factor.shape[0]}, more than {nbytes} bytes and outer sides up "
                f"to {outer} call for"
            )
