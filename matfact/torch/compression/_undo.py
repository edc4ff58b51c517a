"""Layers that have been replaced, kept until nothing can fail any more."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from matfact.torch.layers._inherit import hooks_of
from matfact.torch.layers._weights import is_computing
from matfact.torch.running._mapped import is_worth_a_file, page_out, written


class Replaced:
    """The layers that have been replaced, while they may have to come back.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    folder : Path, optional
        Where their weights wait, in files without a name instead of memory.
    """

    def __init__(self, model: nn.Module, folder: Path | None) -> None:
        self._model, self._folder = model, folder
        self._layers: list[tuple[Sequence[str], nn.Module, dict[str, Any]]] = []
        self._in_files: list[nn.Parameter] = []

    def add(self, names: Sequence[str], layer: nn.Module) -> None:
        """Keep `layer`, which the network has under each of `names`."""
        hooks = {name: copy.copy(held) for name, held in hooks_of(layer).items()}
        self._layers.append((names, layer, hooks))

    def page_out(self) -> None:
        """Let the weights of the layer that was added last wait in files, if there is a folder."""
        if self._folder is None:
            return
        for parameter in self._layers[-1][1].parameters():
            if is_worth_a_file(parameter):
                parameter.data, pages = written(parameter.detach(), self._folder)
                page_out([pages])
                self._in_files.append(parameter)

    def put_back(self) -> None:
        """Leave the network as it was."""
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
def undone_on_error(model: nn.Module, folder: Path | None) -> Iterator[Replaced]:
    """Put the layers that are added to what is yielded back into `model` if anything fails."""
    replaced = Replaced(model, folder)
    try:
        yield replaced
    except BaseException:
        replaced.put_back()
        raise
