"""Tensors in memory-mapped files."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

#: Minimum size of a tensor worth a file, in bytes.
_LEAST = 1 << 16


def is_worth_a_file(tensor: Tensor) -> bool:
    """Whether `tensor` is large and can be stored in a file."""
    is_plain = tensor.layout == torch.strided and tensor.is_contiguous()
    return is_plain and tensor.device.type == "cpu" and tensor.nbytes >= _LEAST


def written(tensor: Tensor, folder: Path) -> tuple[Tensor, mmap.mmap]:
    """Return the tensor stored in an unnamed file, and the file's mapping.

    Its pages take no memory until they are used, or after `page_out`.
    """
    with tempfile.TemporaryFile(dir=folder, prefix="matfact-") as file:
        # Not through the mapping, where a full disk would crash the process.
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        pages = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(pages, dtype=tensor.dtype).reshape(tensor.shape), pages


def page_out(mapped: Iterable[mmap.mmap]) -> None:
    """Release the memory of mapped files until they are used again, if the system can."""
    for pages in mapped:
        if hasattr(pages, "madvise"):
            pages.madvise(mmap.MADV_DONTNEED)
