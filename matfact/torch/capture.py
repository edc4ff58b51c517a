"""Statistics of what reaches the layers of a network, without a copy of its forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.calibration import InputStatistics
from matfact.torch._batches import attended, checked, eval_mode, forward
from matfact.torch._matrices import Matricized, matricized


def input_statistics(
    model: nn.Module, batches: Iterable[Any], layers: str | Sequence[str] | None = None
) -> dict[str, list[InputStatistics]]:
    """Return statistics of the inputs of many layers, from one pass over the batches.

    Batches are forgotten as soon as the model has seen them; a Gram matrix is kept for each layer.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode without gradients.
    batches : iterable
        What the network is called with: tensors, tuples (labels behind the inputs are ignored) or
        mappings. Tokens where the ``attention_mask`` of a mapping is zero do not count.
    layers : str or sequence of str, optional
        A regular expression searched in names of linear or convolutional layers, or their names;
        all of them by default.

    Returns
    -------
    dict of str to list of InputStatistics
        One for each group of each layer that was called, from the patches of a convolution.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import input_statistics
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> statistics = input_statistics(model, [torch.ones(5, 3), torch.ones(4, 3)])
    >>> statistics["0"][0].count, statistics["0"][0].mean
    (9, array([1., 1., 1.]))
    """
    views = layer_views(model, layers)
    found: dict[str, list[InputStatistics]] = {}
    present: Any = None  # the batch that is on its way

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in found:
                found[name] = [InputStatistics() for _ in views[name].matrices()]
            views[name].update(found[name], attended(layer_input(args, kwargs), present))

        return add

    handles = [
        view.layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, view in views.items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            for present in checked(batches):
                forward(model, present)
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_views(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, Matricized]:
    """Return the layers of these names, or found by a regular expression, as matrices."""
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
    """Return the input a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))
