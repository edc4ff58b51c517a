"""Undoing of replacements after an error."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matfact.torch.layers._inherit import hooks_of
from matfact.torch.layers._weights import is_computing
from matfact.torch.running._mapped import is_worth_a_file, page_out, written
from matfact.torch.training._values import stored_values


class Replaced:
    """Replaced layers, kept until an error can no longer occur.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    folder : Path, optional
        Folder for their weights, in unnamed files instead of memory.
    is_trained : bool, default=False
        Whether stored values, biases and norms of the network change too, and are kept as well.
    """

    def __init__(self, model: nn.Module, folder: Path | None, is_trained: bool = False) -> None:
        self._model, self._folder = model, folder
        trained = stored_values(model) if is_trained else []
        self._trained = [(parameter, parameter.detach().clone()) for parameter in trained]
        self._layers: list[tuple[Sequence[str], nn.Module, dict[str, Any]]] = []
        self._in_files: list[nn.Parameter] = []

    def add(self, names: Sequence[str], layer: nn.Module) -> None:
        """Keep `layer`, with all its `names` in the network."""
        hooks = {name: copy.copy(held) for name, held in hooks_of(layer).items()}
        self._layers.append((names, layer, hooks))

    def page_out(self) -> None:
        """Move the weights of the last added layer to files, if there is a folder."""
        if self._folder is None:
            return
        for parameter in self._layers[-1][1].parameters():
            if is_worth_a_file(parameter):
                parameter.data, pages = written(parameter.detach(), self._folder)
                page_out([pages])
                self._in_files.append(parameter)

    def put_back(self) -> None:
        """Restore the network."""
        with torch.no_grad():
            for parameter, values in self._trained:
                parameter.copy_(values)
        for parameter in self._in_files:
            parameter.data = parameter.detach().clone()
        for names, layer, before in reversed(self._layers):
            for name, hooks in hooks_of(layer).items():
                kept = {k: h for k, h in before[name].items() if k in hooks or is_computing(h)}
                restored = {**kept, **hooks}
                hooks.clear()
                hooks.update(restored)
            for name in names:
                self._model.set_submodule(name, layer)


@contextlib.contextmanager
def undone_on_error(
    model: nn.Module, folder: Path | None, is_trained: bool = False
) -> Iterator[Replaced]:
    """Yield an object to record replaced layers, and restore the network if the block fails."""
    replaced = Replaced(model, folder, is_trained)
    try:
        yield replaced
    except BaseException:
        replaced.put_back()
        raise
