"""Safe reading of torch files: no unpickling of arbitrary objects, no decompression bombs.

Such a file is a graph, in which a few bytes can refer to a container or a number many times.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from matfact import backend
from matfact._regular import open_regular
from matfact._text import extra
from matfact.compare._archives import check_expansion, is_zip, members

#: Maximum nesting of containers, and maximum length of names.
_DEEPEST, _LONGEST = 64, 1000
#: Opcodes and functions that torch's loader would run and that could exhaust memory.
_UNREAD = (
    b"\nbytearray\n", b"_codecs\nencode\n", b"\n_rebuild_device_tensor_from_cpu_tensor\n",
)  # fmt: skip
_WINDOW = 1 << 16


def torch_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a torch file by name: dense float ones as arrays, others empty."""
    torch = _torch(path)
    with open_regular(path) as file:
        _check_calls(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        tensors = dict(_tensors(content, "", torch, set()))
        is_read = {name: _is_dense_float(tensor, torch) for name, tensor in tensors.items()}
        distinct = {_view(tensor): tensor for name, tensor in tensors.items() if is_read[name]}
        check_expansion(sum(map(_nbytes, distinct.values())), file)
        arrays = {
            view: np.ascontiguousarray(backend.to_numpy(tensor.detach()))
            for view, tensor in distinct.items()
        }
    for name, tensor in tensors.items():
        yield name, arrays[_view(tensor)] if is_read[name] else np.empty(0, bool)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs torch, or save the weights as safetensors. Torch comes with "
            f"{extra('torch')}."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(
            f"Reading {path} needs torch 2.6 or later, since earlier loaders can be made to run "
            f"code (CVE-2025-32434); found {torch.__version__}."
        )
    return torch


def _check_calls(file: BinaryIO) -> None:
    """Raise ``ValueError`` if a file makes torch's loader build more than tensors."""
    if is_zip(file):
        calls = any(
            _has_calls(archive.open(info))
            for info, archive in members(file)
            if info.filename.endswith("data.pkl")
        )
    else:
        is_pickle = file.read(1) == pickle.PROTO
        calls = not is_pickle or _has_calls(file)
    if calls:
        raise ValueError("it holds more than tensors and containers of them.")
    file.seek(0)


def _has_calls(stream: IO[bytes]) -> bool:
    overlap = b""
    while chunk := stream.read(_WINDOW):
        if any(call in overlap + chunk for call in _UNREAD):
            return True
        overlap = chunk[-max(map(len, _UNREAD)) :]
    return False


def _tensors(
    content: Any, prefix: str, torch: Any, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a state dict, possibly nested in a checkpoint.

    A shared container comes once, under the first of its names.
    """
    if len(prefix) > _LONGEST or depth > _DEEPEST:
        raise ValueError(
            f"{prefix[:40]!r}… is nested more than {_DEEPEST} deep, or a name of more than "
            f"{_LONGEST} characters."
        )
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        for key, value in content.items():
            if isinstance(key, (str, int)):
                name = f"{prefix}.{key}" if prefix else str(key)
                yield from _tensors(value, name, torch, seen, depth + 1)


def _is_dense_float(tensor: Any, torch: Any) -> bool:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    is_here = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_here and tensor.dtype in dtypes and not tensor.is_nested


def _view(tensor: Any) -> tuple[Any, ...]:
    """Return a key shared only by tensors with the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _nbytes(tensor: Any) -> int:
    """Return the bytes of a tensor after reading; 16-bit numbers become 32-bit."""
    return int(tensor.numel()) * max(4, tensor.element_size())
