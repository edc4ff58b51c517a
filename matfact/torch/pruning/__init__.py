"""Pruning of the weights of networks, dense or factorized: scores, masks and FLOPs."""

from matfact.torch.pruning._flops import FlopCount, count_flops
from matfact.torch.pruning._gradual import GradualMagnitude
from matfact.torch.pruning._masks import (
    LayerCollapseWarning,
    Prunable,
    make_permanent,
    prunable_parameters,
    to_torch_prune,
)
from matfact.torch.pruning._prune import PruningReport, prune_network
from matfact.torch.pruning._scores import pruning_scores

__all__ = [
    "FlopCount",
    "GradualMagnitude",
    "LayerCollapseWarning",
    "Prunable",
    "PruningReport",
    "count_flops",
    "make_permanent",
    "prunable_parameters",
    "prune_network",
    "pruning_scores",
    "to_torch_prune",
]
