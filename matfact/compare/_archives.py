"""Safe reading of NumPy files: no unpickling, no decompression bombs."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from matfact._regular import open_regular

#: Maximum expansion of a file relative to its size, beyond _PLAIN_SIZE bytes.
_MAX_EXPANSION = 4
_PLAIN_SIZE = 1 << 24
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")


def numpy_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a ``.npy`` or ``.npz`` file by name."""
    with open_regular(path) as file:
        if not is_zip(file):
            yield path.stem, _array(file, path.stem, os.fstat(file.fileno()).st_size)
            return
        for info, archive in members(file):
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                yield name, _array(member, name, info.file_size)


def is_zip(file: BinaryIO) -> bool:
    """Whether an open file, at its beginning, is an archive."""
    start = file.read(4)
    file.seek(0)
    return start in _ZIP


def members(file: BinaryIO) -> Iterator[tuple[zipfile.ZipInfo, zipfile.ZipFile]]:
    """Yield the members of an archive, unless together they expand too much."""
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
        check_expansion(sum(info.file_size for info in found), file)
        for info in found:
            yield info, archive


def check_expansion(nbytes: int, file: BinaryIO) -> None:
    """Raise ``ValueError`` if a file would expand to many times its size."""
    if nbytes > max(_PLAIN_SIZE, _MAX_EXPANSION * os.fstat(file.fileno()).st_size):
        raise ValueError(
            f"it would expand to {nbytes:,} bytes, more than {_MAX_EXPANSION} times its size. If "
            "this is intended, save the arrays uncompressed (numpy.savez, safetensors)."
        )


def _array(file: IO[bytes], name: str, nbytes: int) -> np.ndarray:
    """Read an array of exactly `nbytes` bytes, since NumPy allocates any declared size."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_2_0  # version 3 differs only in field names
    if version == (1, 0):
        read_header = np.lib.format.read_array_header_1_0
    shape, _, dtype = read_header(file)
    declared = file.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and declared != nbytes:
        raise ValueError(f"{name} declares {declared} bytes but has {nbytes}.")
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array
