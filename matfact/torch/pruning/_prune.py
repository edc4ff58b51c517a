"""Pruning of a network by published scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from matfact import metrics
from matfact.torch.pruning._masks import (
    Predicate,
    Prunable,
    check_weights,
    collapsed_layers,
    prunable_parameters,
    unchanged_on_failure,
    unprunable_layers,
)
from matfact.torch.pruning._scores import Loss, Method, check_finite, scorer
from matfact.torch.running._tensors import check_trainable, outside_inference_mode

Scope = Literal["global", "layer"]

#: Rounds of SynFlow, as published; other scores use one round.
_ROUNDS = {"synflow": 100}


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """Result of pruning, layer by layer.

    Attributes
    ----------
    asked : float
        Requested share of weights to keep.
    kept, sizes : dict of str to int
        Number of kept weights and of all weights, per parameter.
    collapsed : list of str
        Parameters with no weight kept.
    left_out : dict of str to str
        Linear and convolutional layers that are not pruned by default, for example because of a
        custom forward, and why. Empty if the caller chose the parameters.
    """

    asked: float
    kept: dict[str, int]
    sizes: dict[str, int]
    collapsed: list[str]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of weights kept, at most `asked`."""
        return sum(self.kept.values()) / max(1, sum(self.sizes.values()))


@outside_inference_mode
def prune_network(
    model: nn.Module,
    method: Method = "synflow",
    keep: float = 0.1,
    batches: Iterable[Any] = (),
    *,
    loss: Loss | None = None,
    scope: Scope = "global",
    rounds: int | None = None,
    prunable: Predicate | None = None,
    random_state: Any = None,
) -> PruningReport:
    """Prune all but the weights with the highest scores.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place. A pruned ``weight`` is computed from the parameter
        ``weight_orig`` and the mask ``weight_mask``, until `make_permanent`. Values of
        factorized layers are pruned like weights. Existing masks, including those of
        `torch.nn.utils.prune`, are kept. Nothing is changed if scores fail.
    method : {"random", "magnitude", "snip", "grasp", "synflow"}, default="synflow"
        Score of the weights, see `pruning_scores`.
    keep : float, default=0.1
        Maximum share of prunable weights to keep, in (0, 1].
    batches : iterable, default=()
        Inputs of the network, and whatever `loss` needs. SNIP and GraSP use all batches, SynFlow
        only the shape of the first. They are iterated in each round, so generators are not
        allowed.
    loss : callable, optional
        Returns the loss for an output and its batch. For SNIP and GraSP, which run the network in
        training mode.
    scope : {"global", "layer"}, default="global"
        Whether weights of all layers compete, or each layer keeps the same share.
    rounds : int, optional
        Number of rounds, by default 100 for SynFlow and 1 for other scores. Each round recomputes
        the scores of the remaining weights, and the share kept falls exponentially to `keep`.
        SynFlow uses more rounds if one would remove all flow through a layer.
    prunable : callable, optional
        See `prunable_parameters`.
    random_state : int, RandomState or None, default=None
        Seed of random scores.

    Returns
    -------
    PruningReport
        The result for each layer.

    Raises
    ------
    ValueError
        If an argument is invalid, or a loss or score is not finite. The message names the batch or
        the parameter.

    Warns
    -----
    LayerCollapseWarning
        If no weight of a layer is kept.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch.pruning import prune_network
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = prune_network(model, "synflow", keep=0.25, batches=[torch.ones(1, 8)])
    >>> report.share, int(model[0].weight.count_nonzero() + model[2].weight.count_nonzero())
    (0.25, 20)
    """
    _check(method, keep, scope, rounds)
    check_trainable(model)
    parameters = prunable_parameters(model, prunable)
    check_weights(parameters)
    with unchanged_on_failure(parameters):
        score = scorer(model, parameters, method, batches, loss, prunable, random_state)
        n_rounds = _ROUNDS.get(method, 1) if rounds is None else rounds
        groups = [parameters] if scope == "global" else [[p] for p in parameters]
        for k in range(1, n_rounds + 1):
            wanted = [_budget(group, keep ** (k / n_rounds)) for group in groups]
            while any(_kept(group) > n for group, n in zip(groups, wanted, strict=True)):
                by_label = dict(zip([p.label for p in parameters], score(), strict=True))
                for group, n in zip(groups, wanted, strict=True):
                    scores = [by_label[p.label] for p in group]
                    _remove_lowest(group, scores, n, gently=method == "synflow")
    for p in parameters:
        p.settle()
    return PruningReport(
        asked=keep,
        kept={p.label: int(p.mask.sum()) for p in parameters},
        sizes={p.label: p.values.numel() for p in parameters},
        collapsed=collapsed_layers(parameters),
        left_out=unprunable_layers(model) if prunable is None else {},
    )


def _check(method: str, keep: float, scope: str, rounds: int | None) -> None:
    """Raise ``ValueError`` for an invalid parameter."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}.")
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}.")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}.")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")


def _budget(group: list[Prunable], keep: float) -> int:
    """Return the number of weights of `group` to keep."""
    return metrics.part_of(sum(p.values.numel() for p in group), keep)


def _kept(group: list[Prunable]) -> int:
    return sum(int(p.mask.sum()) for p in group)


def _remove_lowest(
    group: list[Prunable], scores: list[Tensor], wanted: int, *, gently: bool = False
) -> None:
    """Mask the lowest scores until `wanted` weights are kept, or fewer of them with `gently`.

    With `gently`, the masked scores add up to less than those of any layer. Since SynFlow conserves
    the flow, no layer is cut off as long as this can be avoided (Tanaka et al. 2020, Theorem 3). If
    the flow can bypass a layer, its best weight is kept.
    """
    flat = torch.cat([score.flatten().double() for score in scores])
    masks = torch.cat([p.mask.flatten() for p in group])
    alive = torch.nonzero(masks).flatten()
    lowest = alive[_lowest(flat[alive], len(alive) - wanted)]
    if gently:
        flows = [float((s * p.mask).sum()) for s, p in zip(scores, group, strict=True)]
        least = min((flow for flow in flows if flow > 0), default=0.0)
        # The margin covers the rounding of the sums.
        spared = int((flat[lowest].cumsum(0) < least * (1.0 - 1e-9)).sum())
        lowest = lowest[:spared] if spared else lowest
        lowest = _leaving_one(group, flat, alive, lowest) if wanted >= len(group) else lowest
    masks[lowest] = False
    for p, mask in zip(group, _by_layer(group, masks), strict=True):
        p.restrict(mask.reshape(p.mask.shape))


def _leaving_one(group: list[Prunable], flat: Tensor, alive: Tensor, lowest: Tensor) -> Tensor:
    """Return as many of the lowest scores as `lowest`, but never all weights of a layer."""
    flat, count = flat.clone(), len(lowest)
    while True:
        left = torch.zeros_like(flat, dtype=torch.bool)
        left[alive] = True
        before = [bool(part.any()) for part in _by_layer(group, left)]
        left[lowest] = False
        emptied = [
            had and not bool(part.any())
            for had, part in zip(before, _by_layer(group, left), strict=True)
        ]
        if not any(emptied):
            return lowest
        left[lowest] = True
        for is_emptied, part, score in zip(
            emptied, _by_layer(group, left), _by_layer(group, flat), strict=True
        ):
            if is_emptied:
                score[torch.where(part, score, -torch.inf).argmax()] = torch.inf
        lowest = alive[_lowest(flat[alive], count)]


def _by_layer(group: list[Prunable], values: Tensor) -> tuple[Tensor, ...]:
    """Split values for all parameters into those of each."""
    return values.split([p.mask.numel() for p in group])


def _lowest(values: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` lowest values, ascending; ties go to the first."""
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=values.device)
    threshold = values.kthvalue(count).values
    below = torch.nonzero(values < threshold).flatten()
    equal = torch.nonzero(values == threshold).flatten()[: count - len(below)]
    return torch.cat([below[values[below].argsort(stable=True)], equal])


def prune_lowest_magnitudes(parameters: list[Prunable], keep: float, scope: Scope) -> None:
    """Keep a share `keep` of weights by magnitude, over all weights or within each layer."""
    groups = [parameters] if scope == "global" else [[p] for p in parameters]
    magnitudes = [[p.values.detach().abs() for p in group] for group in groups]
    for group, scores in zip(groups, magnitudes, strict=True):
        check_finite(group, scores, "magnitude")
    for group, scores in zip(groups, magnitudes, strict=True):
        if _kept(group) > (wanted := _budget(group, keep)):
            _remove_lowest(group, scores, wanted)
    for p in parameters:
        p.settle()
