"""Offloading of the tensors of waiting batches to memory-mapped files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration._passes import Pass
from matfact.torch.running._mapped import is_worth_a_file, written


@contextlib.contextmanager
def offloading(model: nn.Module, blocks: Collection[str], folder: Path | None) -> Iterator[None]:
    """Store tensors passed between modules in files, if there is a `folder`.

    Outputs of `blocks`, and of modules outside of them, are replaced by memory-mapped copies. They
    can be used like any tensor; a waiting pass releases their pages. Files have no name, and vanish
    with the tensors or the process.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    blocks : collection of str
        Modules before which passes wait.
    folder : Path or None
        Folder for the files; not a RAM disk.
    """
    with contextlib.ExitStack() as handles:
        if folder is not None:
            for _, module in between(model, blocks):
                handle = module.register_forward_hook(_hook(folder), with_kwargs=True)
                handles.callback(handle.remove)
        yield


def between(model: nn.Module, blocks: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks, and the outermost modules that are neither inside nor around a block."""
    holders = {""} | {name for block in blocks for name in _holders(block)}
    for name, module in model.named_modules():
        is_scripted = isinstance(module, torch.jit.ScriptModule)  # does not support hooks
        if name not in holders and name.rpartition(".")[0] in holders and not is_scripted:
            yield name, module


def _holders(block: str) -> Iterator[str]:
    while block := block.rpartition(".")[0]:
        yield block


def _hook(folder: Path) -> Callable[..., Any]:
    def offload(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        present = Pass.advancing()
        if present is None:  # a trial, or a call from outside
            return output
        entered = {_place(each) for each in _tensors((args, dict(kwargs)))}
        return _offloaded(output, entered, present, folder)

    return offload


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _offloaded(output: Any, entered: Collection[int], present: Pass, folder: Path) -> Any:
    """Return `output` with large tensors in files, except tensors from the inputs."""
    if type(output) is tuple:
        return tuple(_offloaded(each, entered, present, folder) for each in output)
    if type(output) is not Tensor or output.requires_grad:
        return output
    if not is_worth_a_file(output) or _place(output) in entered:
        return output
    mapped, pages = written(output, folder)
    present.offloaded.add(pages)
    return mapped
