"""Tensors in files that are mapped into memory."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

#: Bytes of the smallest tensors worth a file.
_LEAST = 1 << 16


def is_worth_a_file(tensor: Tensor) -> bool:
    """Whether `tensor` is large, and plain enough for a file to hold it."""
    is_plain = tensor.layout == torch.strided and tensor.is_contiguous()
    return is_plain and tensor.device.type == "cpu" and tensor.nbytes >= _LEAST


def written(tensor: Tensor, folder: Path) -> tuple[Tensor, mmap.mmap]:
    """Return the tensor in a file without a name, and the mapping of the file.

    Its pages take no memory until they are used, and again after :func:`page_out`.
    """
    with tempfile.TemporaryFile(dir=folder, prefix="matfact-") as file:
        # Not through the mapping, where a full disk would end the process.
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        pages = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(pages, dtype=tensor.dtype).reshape(tensor.shape), pages


def page_out(mapped: Iterable[mmap.mmap]) -> None:
    """Take mapped files out of memory until somebody uses them, where the system can."""
    for pages in mapped:
        if hasattr(pages, "madvise"):
            pages.madvise(mmap.MADV_DONTNEED)
