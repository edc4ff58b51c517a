"""Pruning of hidden units and channels, with a refit of the layers that read them."""

from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._find import find_blocks
from matfact.torch.neurons._prune import NeuronPruning, PrunedBlock, prune_neurons

__all__ = ["NeuronBlock", "NeuronPruning", "PrunedBlock", "find_blocks", "prune_neurons"]
