"""Statistics of the inputs of a network's layers, collected with hooks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.calibration import InputStatistics
from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside
from matfact.torch.layers._matricized import Matricized, matricized
from matfact.torch.running._batches import attended, checked, eval_mode, forward
from matfact.torch.running._random import batch_states, drawing
from matfact.torch.running._traces import Traces


def input_statistics(
    model: nn.Module, batches: Iterable[Any], layers: str | Sequence[str] | None = None
) -> dict[str, list[InputStatistics]]:
    """Return statistics of the inputs of layers, from one pass over the batches.

    Batches are not kept; memory holds one Gram matrix per layer.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode without gradients.
    batches : iterable
        Inputs of the network: tensors, tuples (labels after the inputs are ignored) or mappings.
        Tokens with a zero in the ``attention_mask`` of a mapping are ignored.
    layers : str or sequence of str, optional
        A regular expression to search in names of linear or convolutional layers, or their names.
        All such layers by default.

    Returns
    -------
    dict of str to list of InputStatistics
        One per group of each called layer; for convolutions, of the patches.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import input_statistics
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> statistics = input_statistics(model, [torch.ones(5, 3), torch.ones(4, 3)])
    >>> statistics["0"][0].count, statistics["0"][0].mean
    (9, array([1., 1., 1.]))
    """
    found = captured(model, batches, layer_views(model, layers), split=False)
    return {name: statistics.fitted for name, statistics in found.items()}  # type: ignore[misc]


def captured(
    model: nn.Module, batches: Iterable[Any], views: Mapping[str, Matricized], *, split: bool = True
) -> dict[str, LayerStatistics]:
    """Return statistics of layer inputs over all calls in one pass over the batches.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batches : iterable
        As in `input_statistics`.
    views : mapping of str to Matricized
        The layers.
    split : bool, default=True
        Whether to hold out some batches.

    Raises
    ------
    ValueError
        If an input of a layer is not finite. The message names the layer and the batch.
    """
    found: dict[str, LayerStatistics] = {}
    present: tuple[int, Any] = 0, None  # the current batch

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index, batch = present
            x = rows_of(views[name], layer_input(args, kwargs), batch, model)
            if name not in found:
                found[name] = LayerStatistics.of(views[name], paired=False)
            with naming(name, index):
                found[name].add(views[name], x, aside=split and is_aside(index))

        return add

    with contextlib.ExitStack() as handles:
        for name, view in views.items():
            handle = view.layer.register_forward_pre_hook(hook(name), with_kwargs=True)
            handles.callback(handle.remove)
        handles.enter_context(eval_mode(model))
        handles.enter_context(torch.no_grad())
        states = batch_states(model)
        handles.callback(Traces(model).restore)
        for present in enumerate(checked(batches)):
            with drawing(next(states)):
                forward(model, present[1])
    return found


def rows_of(view: Matricized, x: Tensor, batch: Any, model: nn.Module) -> Tensor:
    """Return the input of a layer, without padding if the layer multiplies rows."""
    return attended(x, batch, model) if view.by_rows else x


@contextlib.contextmanager
def naming(layer: str, batch: int) -> Iterator[None]:
    """Add the layer and the batch to errors in input statistics."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"inputs of layer {layer!r} in calibration batch {batch}: {error}"
        ) from None


def layer_views(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, Matricized]:
    """Return the matrix views of layers given by names or by a regular expression."""
    if layers is None or isinstance(layers, str):
        every = ((name, matricized(module)) for name, module in model.named_modules())
        pattern = layers or ""
        found = {name: v for name, v in every if v is not None and re.search(pattern, name)}
        if pattern and not found:
            raise ValueError(f"layers must name linear layers or convolutions, got {layers!r}.")
        return found
    present = dict(model.named_modules(remove_duplicate=False))
    views = {name: matricized(present[name]) if name in present else None for name in layers}
    for name, view in views.items():
        if view is None:
            raise ValueError(f"layers must name linear layers or convolutions, got {name!r}.")
    return views  # type: ignore[return-value]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a layer's call."""
    return args[0] if args else next(iter(kwargs.values()))
